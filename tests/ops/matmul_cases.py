"""The formats and shapes that every way to multiply must serve: `tests/ops` and `tests/gpu` run them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvq.array import Affine, Codebook, QuantizedArray, combine, partition
from jaxvq.bits import PackedCodes, pack, word_count
from jaxvq.layout import Layout
from tests.ops.matmul_by_hand import gradients_by_hand, weight_by_hand

# name: bits, values of a code, stages, entries, (#g or values in a group, #out) of the decoder, dtype of its vectors
PALETTES = {
    "4-bit palettes": (4, 1, 1, 16, (1, "out"), "float32"),
    "4-bit palette of the tensor": (4, 1, 1, 16, (1, 1), "float32"),
    "4-bit palettes of groups": (4, 1, 1, 16, ("g", "out"), "bfloat16"),
    "4-bit int8 palettes": (4, 1, 1, 16, (1, "out"), "int8"),
    "4-bit int8 palettes of groups": (4, 1, 1, 16, ("g", "out"), "int8"),
    "13 entries": (4, 1, 1, 13, (1, "out"), "float16"),
    "3-bit palettes": (3, 1, 1, 8, (1, "out"), "float32"),
    "3-bit palettes of groups": (3, 1, 1, 8, ("g", "out"), "float32"),
    "2-bit palettes": (2, 1, 1, 4, (1, "out"), "bfloat16"),
    "1-bit palettes": (1, 1, 1, 2, (1, "out"), "float32"),
}
VECTORS = {
    "2 x 8 bits, d=8": (8, 8, 2, 256, (1, 1), "float32"),
    "1 x 12 bits, d=8": (12, 8, 1, 4096, (1, 1), "bfloat16"),
    "1 x 16 bits, d=8": (16, 8, 1, 65536, (1, 1), "bfloat16"),
    "1 x 14 bits, d=4, int8": (14, 4, 1, 10_000, (1, 1), "int8"),
    "3 x 6 bits, d=4, int8": (6, 4, 3, 64, (1, 1), "int8"),
    "4 x 4 bits, d=8": (4, 8, 4, 16, (1, 1), "float16"),
    "1 x 8 bits, d=2": (8, 2, 1, 200, (1, 1), "float32"),
    "1 x 13 bits, d=8, 5000 entries": (13, 8, 1, 5000, (1, 1), "float32"),
    "1 x 14 bits, d=8, 10,000 entries": (14, 8, 1, 10_000, (1, 1), "bfloat16"),
    "1 x 5 bits, d=4": (5, 4, 1, 32, (1, 1), "float32"),
    "1 x 7 bits, d=4, 100 entries": (7, 4, 1, 100, (1, 1), "bfloat16"),
    "1 x 11 bits, d=8": (11, 8, 1, 2048, (1, 1), "float16"),
    "3 x 9 bits, d=8": (9, 8, 3, 512, (1, 1), "bfloat16"),
    "4 x 8 bits, d=4": (8, 4, 4, 256, (1, 1), "float32"),
}
LEVELS = {f"{bits} bits": (bits, (1, "out"), True) for bits in range(1, 9)} | {
    "4 bits, symmetric": (4, (1, 1), False),
    "4 bits, groups": (4, ("g", "out"), True),
    "8 bits, symmetric groups": (8, ("g", "out"), False),
    "1 bit, symmetric": (1, (1, "out"), False),
}
FORMATS = [*PALETTES, *VECTORS, *LEVELS]
GROUP = 128
SHAPES = [(1024, 96), (1000, 77), (256, 4098), (32, 8)]
ROWS = [1, 2, 3, 16, 33, 100]


def weight(name: str, shape: tuple[int, int], seed: int = 0) -> QuantizedArray:
    """A quantized weight of a format and shape with random codes and a random decoder."""
    generator = np.random.default_rng(seed)
    bits, dim, stages, entries, dtype = _form(name)
    layout, sizes = _sizes(name, shape)
    if name in LEVELS:
        zeros = jnp.asarray(generator.uniform(0, 2**bits, (*sizes, 1)), jnp.float32) if LEVELS[name][2] else None
        decoder = Affine(jnp.asarray(generator.uniform(0.1, 1, (*sizes, 1)), jnp.float32), zeros)
        entries = decoder.entries(bits)
    else:
        vectors = generator.normal(size=(*sizes, stages, entries, dim))
        scale = None
        if dtype == "int8":
            vectors = np.clip(np.round(40 * vectors), -127, 127)
            scale = jnp.asarray(generator.uniform(0.01, 0.1, (*sizes, stages, 1, 1)), jnp.float32)
        decoder = Codebook(jnp.asarray(vectors, dtype), scale)
    codes = jnp.asarray(generator.integers(0, entries, (*layout.grid, stages)), jnp.uint32)
    return QuantizedArray(pack(codes, bits, axis=0), decoder, layout)


def described(name: str, shape: tuple[int, int]) -> QuantizedArray:
    """The shapes and dtypes of such a weight, which may be large."""
    bits, dim, stages, entries, dtype = _form(name)
    layout, sizes = _sizes(name, shape)
    length, outs = layout.grid

    def make() -> QuantizedArray:
        codes = PackedCodes(jnp.zeros((word_count(length, bits), outs, stages), jnp.uint32), bits=bits, length=length)
        if name in LEVELS:
            levels = jnp.zeros((*sizes, 1))
            return QuantizedArray(codes, Affine(levels, levels if LEVELS[name][2] else None), layout)
        scale = jnp.zeros((*sizes, stages, 1, 1)) if dtype == "int8" else None
        return QuantizedArray(codes, Codebook(jnp.zeros((*sizes, stages, entries, dim), dtype), scale), layout)

    return jax.eval_shape(make)


def _form(name: str) -> tuple[int, int, int, int, str]:
    """Bits, values of a code, stages, entries, and the dtype of the decoder."""
    if name in LEVELS:
        return LEVELS[name][0], 1, 1, 0, "float32"
    bits, dim, stages, entries, _, dtype = (PALETTES | VECTORS)[name]
    return bits, dim, stages, entries, dtype


def _sizes(name: str, shape: tuple[int, int]) -> tuple[Layout, tuple[int, int]]:
    """The layout, and the (#g, #out) of the decoder."""
    blocks = LEVELS[name][1] if name in LEVELS else (PALETTES | VECTORS)[name][4]
    grouped, group = blocks[0] == "g", min(GROUP, shape[0])
    layout = Layout.of(shape, "float32", dim=_form(name)[1], group=group if grouped else 1)
    g, outs = layout.grid
    return layout, (g // group if grouped else 1, outs if blocks[1] == "out" else 1)


def inputs(rows: int, columns: int, dtype: str, seed: int = 1) -> jax.Array:
    """Activations."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, columns)), dtype)


def relative_error(got, expected) -> float:
    """|got - expected| / |expected| in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def check_gradients(product, w: QuantizedArray, x: jax.Array) -> None:
    """Those of x and of the decoder, of a function of x and w in float32, are those in float64."""
    trainable, frozen = partition(w)
    cotangent = np.random.default_rng(2).normal(size=(x.shape[0], w.shape[1]))

    def loss(x, trainable):
        return jnp.sum(product(x, combine(trainable, frozen)) * cotangent)

    of_x, of_decoder = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, trainable)
    assert relative_error(of_x, cotangent @ weight_by_hand(w).T) < 1e-6
    by_hand = gradients_by_hand(w, np.asarray(x, np.float64).T @ cotangent)
    for ours, exact in zip(jax.tree.leaves(of_decoder), by_hand, strict=True):
        assert ours.shape == exact.shape
        assert relative_error(ours.astype(jnp.float32), exact) < (1e-5 if ours.dtype == jnp.float32 else 4e-3)
