"""Quantizes a network of random weights in a process of its own, and prints what that took as JSON.

    python -m experiments.clustering_cold NETWORK METHOD

The imports are inside the functions, because they are timed too.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

PAIRS = (
    ((3, 3), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)),
    ((1, 1), (32, 32), (32, 64), (48, 64), (64, 128), (128, 256)),
    ((), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512), (784, 300), (1024, 256), (1024, 10)),
)
TWENTY_SHAPES = tuple((*window, *pair) for window, *pairs in PAIRS for pair in pairs)
NETWORKS: dict[str, dict[str, tuple[int, ...]]] = {
    "tradeoff, 28 x 28": {  # the network of experiments/tradeoff.py
        "Conv_0": (5, 5, 1, 16),
        "Conv_1": (3, 3, 16, 16),
        "Conv_2": (3, 3, 16, 32),
        "Dense_0": (1568, 300),
        "Dense_1": (300, 10),
    },
    "50 layers, 20 shapes": {f"Layer_{i}": TWENTY_SHAPES[i % 20] for i in range(50)},
    "tiny": {"Dense_0": (16, 8)},
}
METHODS = ("KMeans(bits=4)", "KMeans(bits=4, channel)", "Product(bits=8, dim=4)")
ENTRIES, DIM = 256, 4


def quantize(network: str, method: str) -> dict[str, Any]:
    """Seconds of the imports and of the one call, compilation included, and how many programs cluster.

    The processor's time tells a busy machine from a slow program.
    """
    shapes = NETWORKS[network]
    start = time.perf_counter()
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxvq
    from jaxvq.cluster.palettes import fit_palettes
    from jaxvq.cluster.product import fit_product

    import_seconds = time.perf_counter() - start
    random = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(random.normal(0, math.prod(shape[:-1]) ** -0.5, shape), jnp.float32)}
        for name, shape in shapes.items()
    }
    spec = spec_of(method, shapes)
    start, cpu_start = time.perf_counter(), time.process_time()
    jax.block_until_ready(jaxvq.quantize_params(params, spec, key=jax.random.key(0)))
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "import_seconds": import_seconds,
        "fit_palettes_programs": fit_palettes._cache_size(),  # type: ignore[attr-defined]
        "fit_product_programs": fit_product._cache_size(),  # type: ignore[attr-defined]
    }


def spec_of(method: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    """The method everywhere; layers with too few vectors for a codebook get palettes instead."""
    from jaxvq import KMeans, Product, Rule, Spec

    if method == "Product(bits=8, dim=4)":
        small = [name for name, shape in shapes.items() if math.prod(shape) < 2 * ENTRIES * DIM]
        rules = tuple(Rule(f"{name}/kernel", KMeans(bits=4)) for name in small)
        return Spec(rules=rules, default=Product(k=ENTRIES, dim=DIM))
    return {"KMeans(bits=4)": KMeans(bits=4), "KMeans(bits=4, channel)": KMeans(bits=4, per="channel")}[method]


def in_cold_process(network: str, method: str) -> dict[str, Any]:
    """`quantize` in a new process that has no compiled programs to load.

    Raises:
      RuntimeError: when the process fails, with the end of what it said.
    """
    command = [sys.executable, "-m", "experiments.clustering_cold", network, method]
    root = pathlib.Path(__file__).resolve().parents[1]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(quantize(*sys.argv[1:])))
