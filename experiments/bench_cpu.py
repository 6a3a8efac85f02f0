"""How long a product with a quantized weight takes on a CPU, beside the same product in float32.

    python -m experiments.bench_cpu [--smoke] [--out FOLDER]

Claim: a CPU multiplies a row with codes of vectors about as fast as with a float32 matrix, by tables of inner products,
and few rows with palettes several times as fast as if it decoded the weight first, by decoding a tile at a time.
Gradients take less time too.

The weights are random codes under random decoders; the time does not depend on their values. Programs run by turns,
twice each, and the median of the second runs counts. The gradient is that of x and of the decoder.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import rich.box
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

import jaxvq
from experiments.matmul_contenders import CONTENDERS
from jaxvq.array import QuantizedArray, combine, partition

FLOAT = "float32"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is multiplied.

    Attributes:
      inputs: of the weight.
      outputs: of the weight.
      rows: of x.
      contenders: which of the formats in `matmul_contenders.CONTENDERS`.
      repeats: timed runs of each program.
      largest_error: relative to the float64 product.
      seed: of weights and inputs.
      out: the folder for chart and results.
    """

    inputs: int = 4096
    outputs: int = 4096
    rows: tuple[int, ...] = (1, 4, 16)
    contenders: tuple[str, ...] = ("palette4", "palette3", "affine4", "affine8", "residual-2x8", "product-12")
    repeats: int = 15
    largest_error: float = 1e-5
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/bench_cpu")


SMOKE = Config(inputs=256, outputs=128, rows=(1, 4), contenders=("palette4", "residual-2x8"), repeats=2)


def main(config: Config) -> dict[str, Any]:
    """Times every contender; returns `{"config", "device", "rows"}`, written and drawn.

    Raises:
      RuntimeError: when a product is not that of the decoded weight.
    """
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    weights = {name: make_weight(name, config) for name in config.contenders}
    rows = [row for count in config.rows for row in measure(count, weights, config, console)]
    found = {
        "config": dataclasses.asdict(config) | {"out": str(config.out)},
        "device": f"{jax.devices()[0].device_kind}, {len(jax.devices())} device",
        "rows": rows,
    }
    (config.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(as_table(rows, config))
    draw(rows, config).savefig(config.out / "bench_cpu.png", dpi=120)
    console.print(f"written to {config.out}")
    for row in rows:
        if not row["relative_error"] < config.largest_error:
            raise RuntimeError(
                f"the product with {row['title']} must be that of the decoded weight within "
                f"{config.largest_error:g}, got {row['relative_error']:.1e}"
            )
    return found


def make_weight(name: str, config: Config) -> QuantizedArray:
    """One of random codes, all in float32."""
    w = CONTENDERS[name].make(jax.random.key(config.seed), config.inputs, config.outputs)
    trainable, frozen = partition(dataclasses.replace(w, layout=dataclasses.replace(w.layout, dtype=FLOAT)))
    return combine(jax.tree.map(lambda leaf: leaf.astype(FLOAT), trainable), frozen)


def programs(w: QuantizedArray, x: Float[Array, "n in"], cotangent: Float[Array, "n out"]) -> dict[str, Callable]:
    """The product, the same with the weight decoded first, and their gradients, as functions without arguments."""
    trainable, frozen = partition(w)

    def gradient(product: Callable) -> Callable:
        def loss(x: Array, trainable: Any, frozen: Any) -> Array:
            return jnp.vdot(product(x, combine(trainable, frozen)), cotangent)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return lambda: compiled(x, trainable, frozen)

    def first(x: Array, w: QuantizedArray) -> Array:
        return x @ w.dequantize()

    compiled, plain = jax.jit(jaxvq.matmul), jax.jit(first)
    return {
        "matmul": lambda: compiled(x, w),
        "first": lambda: plain(x, w),
        "matmul_gradient": gradient(jaxvq.matmul),
        "first_gradient": gradient(first),
    }


def measure(count: int, weights: dict[str, QuantizedArray], config: Config, console: Console) -> list[Row]:
    """A row for each contender and so many rows of x, with milliseconds."""
    x_key, c_key, w_key = jax.random.split(jax.random.key(config.seed + 1), 3)
    x = jax.random.normal(x_key, (count, config.inputs))
    cotangent = jax.random.normal(c_key, (count, config.outputs))
    matrix = jax.random.normal(w_key, (config.inputs, config.outputs))
    dense = jax.jit(jnp.matmul)
    runs: dict[tuple[str, str], Callable] = {(FLOAT, "matmul"): lambda: dense(x, matrix)}
    for name, w in weights.items():
        runs |= {(name, kind): run for kind, run in programs(w, x, cotangent).items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in track(range(config.repeats), f"{count} rows", console=console, transient=True):
        for key, run in runs.items():
            jax.block_until_ready(run())  # what the one before has left in caches and memory is not its own
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[key].append(1e3 * (time.perf_counter() - began))
    milliseconds = {key: statistics.median(each) for key, each in times.items()}
    return [
        {
            "contender": name,
            "title": CONTENDERS[name].title,
            "rows": count,
            "bits_per_weight": w.bits_per_weight,
            "float": milliseconds[FLOAT, "matmul"],
            **{kind: milliseconds[name, kind] for other, kind in runs if other == name},
            "relative_error": relative_error(runs[name, "matmul"](), x, w),
        }
        for name, w in weights.items()
    ]


def relative_error(got: Float[Array, "n out"], x: Float[Array, "n in"], w: QuantizedArray) -> float:
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))


def as_table(rows: list[Row], config: Config) -> Table:
    heads = ("rows", "bits", "float32", "matmul", "first", "gradient", "first")
    columns = (Column(head, justify="right", no_wrap=True) for head in heads)
    first = Column("weight", no_wrap=True)
    table = Table(first, *columns, box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.title = f"x @ w in milliseconds, w {config.inputs} x {config.outputs}, float32"
    table.caption = "first: with the weight decoded first"
    for row in rows:
        times = (row[kind] for kind in ("float", "matmul", "first", "matmul_gradient", "first_gradient"))
        numbers = (f"{time:.2f}" for time in times)
        table.add_row(row["title"], str(row["rows"]), f"{row['bits_per_weight']:.2f}", *numbers)
    return table


def draw(rows: list[Row], config: Config) -> matplotlib.figure.Figure:
    """A panel for each number of rows; for each weight the product's time and that with the weight decoded first."""
    figure = matplotlib.figure.Figure(figsize=(3.4 * len(config.rows) + 1.4, 0.6 * len(config.contenders) + 2.0))
    panels = figure.subplots(1, len(config.rows), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, config.rows, strict=True):
        part = [row for row in rows if row["rows"] == count]
        most = max(row[kind] for row in rows for kind in ("matmul", "first"))
        for place, row in enumerate(part):
            for offset, kind, colour in ((-0.19, "matmul", "tab:blue"), (0.19, "first", "0.75")):
                axes.barh(place + offset, row[kind], 0.36, color=colour)
                axes.text(row[kind] + most / 60, place + offset, f"{row[kind]:.1f}", va="center", fontsize=8)
        axes.axvline(part[0]["float"], color="0.3", linestyle="--", linewidth=1)
        axes.set_title(f"{count} row{'s' * (count > 1)}; float32 {part[0]['float']:.1f} ms", loc="left", fontsize=10)
        axes.set_xlim(0, 1.15 * most)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(config.contenders)), [CONTENDERS[name].title for name in config.contenders])
    panels[0].invert_yaxis()
    what = f"milliseconds of x @ w on a CPU, w {config.inputs} x {config.outputs}"
    figure.supxlabel(f"{what}; blue: jaxvq.matmul, grey: decoded first, dashed: a float32 matrix", fontsize=9)
    figure.suptitle("Products with quantized weights on a CPU", x=0.01, ha="left")
    figure.tight_layout()
    return figure


def cli(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", default=Config.out)
    given = parser.parse_args(arguments)
    if jax.default_backend() != "cpu":
        parser.error(f"the times are a CPU's, and jax computes on {jax.default_backend()}; set JAX_PLATFORMS=cpu")
    return main(dataclasses.replace(SMOKE if given.smoke else Config(), out=given.out))


if __name__ == "__main__":
    cli()
