"""Who multiplies in `experiments/bench_matmul.py`, the library's formats and packages for PyTorch, and how it is timed.

The weights are random bits under random decoders, since the time does not depend on their values.
"""

import dataclasses
import functools
import importlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

import jaxvq
from jaxvq.array import AbstractDecoder, Affine, Codebook, QuantizedArray
from jaxvq.bits import WORD, PackedCodes, word_count
from jaxvq.layout import Layout

Row = dict[str, Any]
Product = Callable[[Any, Any], Any]
DTYPE = jnp.bfloat16
KEPT = 128  # output columns of each product that are added up
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all", "partition-id"}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to multiply with a weight.

    Attributes:
      title: for people.
      make: a random weight from a key and the numbers of its inputs and outputs.
      product: of x `[rows, inputs]` and the weight.
      columns: some output columns of the weight as it should be decoded, `[inputs, n]`.
      judged: whether the error has a target.
    """

    title: str
    make: Callable[[Array, int, int], Any]
    product: Product
    columns: Callable[[Any, Int[np.ndarray, " n"]], Float[Array, "in n"]]
    judged: bool = True


def matrix(key: Array, inputs: int, outputs: int) -> Float[Array, "in out"]:
    return jax.random.normal(key, (inputs, outputs), DTYPE)


def transposed_matrix(key: Array, inputs: int, outputs: int) -> Float[Array, "out in"]:
    return jax.random.normal(key, (outputs, inputs), DTYPE)


def transposed_product(x: Float[Array, "rows in"], w: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def palettes(key: Array, inputs: int, outputs: int, *, bits: int) -> QuantizedArray:
    """A table of its own for each output, with entries in bfloat16."""
    words, vectors = jax.random.split(key)
    decoder = Codebook(jax.random.normal(vectors, (1, outputs, 1, 2**bits, 1), DTYPE))
    return random_codes(words, inputs, outputs, decoder, bits=bits)


def int8_palettes(key: Array, inputs: int, outputs: int, *, bits: int) -> QuantizedArray:
    """A table of its own for each output, with entries in int8 and a scale."""
    words, vectors, scale = jax.random.split(key, 3)
    entries = jax.random.randint(vectors, (1, outputs, 1, 2**bits, 1), -127, 128, jnp.int8)
    scales = jax.random.uniform(scale, (1, outputs, 1, 1, 1), minval=0.01, maxval=0.02)
    return random_codes(words, inputs, outputs, Codebook(entries, scales), bits=bits)


def codebooks(key: Array, inputs: int, outputs: int, *, bits: int, stages: int, dim: int = 8) -> QuantizedArray:
    """One codebook of vectors for each stage, with entries in bfloat16."""
    words, vectors = jax.random.split(key)
    decoder = Codebook(jax.random.normal(vectors, (1, 1, stages, 2**bits, dim), DTYPE))
    return random_codes(words, inputs, outputs, decoder, bits=bits, stages=stages, dim=dim)


def affine(key: Array, inputs: int, outputs: int, *, bits: int) -> QuantizedArray:
    """Evenly spaced levels with a scale and a zero point for each output."""
    words, scale, zero = jax.random.split(key, 3)
    scales = jax.random.uniform(scale, (1, outputs, 1), minval=0.01, maxval=0.02)
    zeros = jax.random.uniform(zero, (1, outputs, 1), minval=0.4 * 2**bits, maxval=0.6 * 2**bits)
    return random_codes(words, inputs, outputs, Affine(scales, zeros), bits=bits)


def random_codes(
    key: Array, inputs: int, outputs: int, decoder: AbstractDecoder, *, bits: int, stages: int = 1, dim: int = 1
) -> QuantizedArray:
    """A weight of random bits, those beyond the last code cleared; each value of `bits` bits must be a code."""
    layout = Layout.of((inputs, outputs), DTYPE, dim=dim)
    length, _ = layout.grid
    count = word_count(length, bits)
    words = jax.random.bits(key, (count, outputs, stages), "uint32")
    words = words.at[-1].set(words[-1] & np.uint32(2 ** (length * bits - (count - 1) * WORD) - 1))
    return QuantizedArray(PackedCodes(words, bits=bits, length=length), decoder, layout)


def decoded_columns(w: QuantizedArray, columns: Int[np.ndarray, " n"]) -> Float[Array, "in n"]:
    """Some columns of the weight, decoded on their own in float32."""
    codes, decoder = jax.tree.map(lambda leaf: leaf[:, columns] if leaf.shape[1] > 1 else leaf, (w.codes, w.decoder))
    layout = dataclasses.replace(w.layout, shape=(w.layout.shape[0], len(columns)), dtype="float32")
    return QuantizedArray(codes, decoder, layout).dequantize()


def _ours(title: str, make: Callable[..., QuantizedArray], backend: str | None = None, **settings: int) -> Contender:
    product = functools.partial(jaxvq_product, backend=backend)
    return Contender(title, functools.partial(make, **settings), product, decoded_columns)


def jaxvq_product(x: Float[Array, "rows in"], w: QuantizedArray, *, backend: str | None) -> Float[Array, "rows out"]:
    return jaxvq.matmul(x, w, backend=backend)


REFERENCES = ("bf16", "bf16-transposed")  # the faster one is 1 in the ratios
CONTENDERS = {
    "bf16": Contender("bf16", matrix, jnp.matmul, lambda w, columns: w[:, columns], judged=False),
    "bf16-transposed": Contender(
        "bf16, [out, in]", transposed_matrix, transposed_product, lambda w, columns: w[columns].T, judged=False
    ),
    "palette4": _ours("4-bit palettes", palettes, bits=4),
    "palette4-int8": _ours("4-bit palettes, int8", int8_palettes, bits=4),
    "palette3": _ours("3-bit palettes", palettes, bits=3),
    "palette2": _ours("2-bit palettes", palettes, bits=2),
    "residual-2x8": _ours("2 x 8 bits, d=8", codebooks, stages=2, bits=8),
    "product-12": _ours("1 x 12 bits, d=8", codebooks, stages=1, bits=12),
    "product-16": _ours("1 x 16 bits, d=8", codebooks, stages=1, bits=16),
    "affine4": _ours("Affine, 4 bits", affine, bits=4),
    "affine8": _ours("Affine, 8 bits", affine, bits=8),
    "palette4-xla": _ours("4-bit palettes, XLA", palettes, backend="xla", bits=4),
}


def nbytes_of(weight: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))


@dataclasses.dataclass
class Run:
    """A contender's program with what goes in, its times so far, and its row."""

    row: Row
    turns: int
    weights: list[Any]
    program: Callable[..., Array] | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """Takes a step unless something has failed before; a failure is written down, and the others go on."""
        if "failed" in self.row:
            return
        try:
            step(self, *arguments)
        except Exception as error:
            self.row["failed"] = f"failed: {why_not(error)}"
            self.program = None


def compiled(product: Product, run: Run, xs: Float[Array, "n rows in"]) -> Any:
    program = jax.jit(functools.partial(many_turns, product, run.turns))
    return program.lower(xs, run.weights).compile()


def many_turns(
    product: Product, turns: int, xs: Float[Array, "n rows in"], weights: list[Any]
) -> Float32[Array, "rows kept"]:
    """The sum of the products of changing x with all weights, or of x itself without any.

    The barriers keep the compiler from computing anything about the weights once for all turns, from making one product
    of two because they have the same x, and from computing less than whole products although only their first columns
    are added up: to add up all would take longer than some products do.
    """

    def turn(i: Array, total: Array) -> Array:
        x = lax.dynamic_index_in_dim(xs, lax.rem(i, jnp.int32(xs.shape[0])), keepdims=False)
        results = [product(*lax.optimization_barrier((x, weight))) for weight in weights]
        results = lax.optimization_barrier(results or [x])
        return sum((result[:, :kept].astype(jnp.float32) for result in results), start=total)

    kept = min(KEPT, xs.shape[2])
    begin = jnp.zeros((xs.shape[1], kept), jnp.float32)
    return lax.fori_loop(0, turns, turn, begin)


def take_turn(run: Run, xs: Float[Array, "n rows in"]) -> None:
    assert run.program is not None
    began = time.perf_counter()
    jax.block_until_ready(run.program(xs, run.weights))
    run.seconds.append(time.perf_counter() - began)


def launches(text: str) -> int:
    """How many kernels a compiled program starts, by its text; those in a loop count once."""
    parts: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            parts[name] = []
        elif name and " = " in line:
            parts[name].append(line.split(" = ", 1)[1])

    def count(name: str) -> int:
        total = 0
        for line in parts[name]:
            operation = re.search(r"(?<= )([a-z][\w\-]*)\(", line)
            kind = operation[1] if operation else ""
            if kind in ("while", "call", "async-start"):
                total += sum(map(count, re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line)))
            elif kind not in FREE and not kind.endswith("-done"):
                total += 1
        return total

    return count(entry)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A product of another package.

    Attributes:
      title: for people.
      modules: what it imports after PyTorch.
      make: from those modules, PyTorch first, and the numbers of inputs and outputs: a product, a function of x, and
        the bytes of its weight.
      dtype: of x, by PyTorch's name.
    """

    title: str
    modules: tuple[str, ...]
    make: Callable[..., tuple[Callable[[Any], Any], int]]
    dtype: str = "bfloat16"


def torch_linear(torch: Any, inputs: int, outputs: int) -> tuple[Callable[[Any], Any], int]:
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    return functools.partial(_linear, torch, weight), weight.nbytes


def _linear(torch: Any, weight: Any, x: Any) -> Any:
    return torch.nn.functional.linear(x, weight)


def torchao_int4(torch: Any, torchao: Any, inputs: int, outputs: int) -> tuple[Callable[[Any], Any], int]:
    """tinygemm: even levels, a scale and a zero point in bfloat16 for 128 values each."""
    layer = torch.nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    torchao.quantize_(layer, _int4_of_torchao(torchao))
    return layer, inputs * outputs // 2 + 4 * inputs * outputs // 128


def _int4_of_torchao(torchao: Any) -> Any:
    """What asks for tinygemm; each version of torchao has its own way."""
    if not hasattr(torchao, "Int4WeightOnlyConfig"):
        return torchao.int4_weight_only(group_size=128)
    try:
        return torchao.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    except TypeError:  # an older one, which knows no other format
        return torchao.Int4WeightOnlyConfig(group_size=128)


def bitsandbytes_nf4(torch: Any, package: Any, inputs: int, outputs: int) -> tuple[Callable[[Any], Any], int]:
    """A fixed table of 16 values, a scale in float32 for 64 values each."""
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    packed, state = package.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed = packed.t()
    return lambda x: package.matmul_4bit(x, packed, quant_state=state), packed.nbytes + state.absmax.nbytes


def aqlm(
    torch: Any, package: Any, inputs: int, outputs: int, *, stages: int, bits: int
) -> tuple[Callable[[Any], Any], int]:
    """Its layer, which takes its CUDA kernels for few rows and decodes the weight for more."""
    layer = package.QuantizedLinear(
        inputs,
        outputs,
        in_group_size=8,
        out_group_size=1,
        num_codebooks=stages,
        nbits_per_codebook=bits,
        bias=False,
        device="cuda",
        dtype=torch.float16,
    )
    with torch.no_grad():
        layer.codebooks.normal_()
        layer.scales.fill_(1)
        half = 2 ** (bits - 1)  # its codes are signed
        layer.codes.copy_(torch.randint(-half, half, layer.codes.shape, device="cuda"))
    return layer, sum(part.nbytes for part in (layer.codebooks, layer.scales, layer.codes))


# Run with torchao 0.18, bitsandbytes 0.50 and aqlm 1.1.7. Where an interface is another one, the row says what failed.
PEERS = {
    "torch-bf16": Peer("PyTorch bf16", (), torch_linear),
    "torchao-int4": Peer("torchao int4", ("torchao.quantization",), torchao_int4),
    "bitsandbytes-nf4": Peer("bitsandbytes NF4", ("bitsandbytes",), bitsandbytes_nf4),
    "aqlm-2x8": Peer("AQLM 2 x 8", ("aqlm",), functools.partial(aqlm, stages=2, bits=8), "float16"),
    "aqlm-1x16": Peer("AQLM 1 x 16", ("aqlm",), functools.partial(aqlm, stages=1, bits=16), "float16"),
}


def find_peers(names: tuple[str, ...], say: Callable[[str], None]) -> dict[str, list[Any]]:
    """The modules of each peer that can run, PyTorch first; why another one cannot is said in a line."""
    found: dict[str, list[Any]] = {}
    reasons: dict[str, list[str]] = {}
    for name in names:
        try:
            modules = [importlib.import_module(module) for module in ("torch", *PEERS[name].modules)]
            if not modules[0].cuda.is_available():
                raise RuntimeError("PyTorch sees no GPU")
            found[name] = modules
        except Exception as error:  # a package may fail in any way when it looks for a GPU
            reasons.setdefault(why_not(error), []).append(PEERS[name].title)
    for reason, titles in reasons.items():
        say(f"{reason}; left out: {', '.join(titles)}")
    return found


def why_not(error: Exception) -> str:
    """What went wrong, in a line; for a package that is missing, how to get it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        wheel = "aqlm[gpu]" if package == "aqlm" else package
        return f"{package} is not installed: pip install {wheel}"
    message = (str(error).strip() or "no message").splitlines()[0][:200]
    return message if isinstance(error, RuntimeError) else f"{type(error).__name__}: {message}"


def peer_seconds(
    peer: Peer,
    modules: list[Any],
    shape: tuple[int, int, int],
    *,
    count: Callable[[int], int],
    turns: int,
    repeats: int,
) -> tuple[float, int, int]:
    """Seconds of a product, bytes of the weight, and how many weights took turns.

    The products of a turn are recorded as a CUDA graph; events before and after many replays tell the time.

    Args:
      peer: whose product.
      modules: see `find_peers`.
      shape: rows of x, inputs and outputs.
      count: how many weights of so many bytes take turns.
      turns: replays between two events.
      repeats: how often that is timed; the median counts.
    """
    torch, (rows, inputs, outputs) = modules[0], shape
    x = torch.randn(rows, inputs, device="cuda", dtype=getattr(torch, peer.dtype))
    with torch.no_grad():
        first, nbytes = peer.make(*modules, inputs, outputs)
        products = [first, *(peer.make(*modules, inputs, outputs)[0] for _ in range(count(nbytes) - 1))]
        replay = recorded(torch, products, x)
        times = []
        for _ in range(repeats):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            for _ in range(turns):
                replay()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after) / 1e3 / turns / len(products))
    return statistics.median(times), nbytes, len(products)


def recorded(torch: Any, products: list[Callable[[Any], Any]], x: Any) -> Callable[[], Any]:
    """A graph of all products, after two turns in which the packages make their choices, on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for product in products:
                product(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    graph.replay()
    return graph.replay
