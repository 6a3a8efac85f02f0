"""Makes tests/data/golden_v1.*: `python tests/make_golden.py`. The files are never to change, so run it for v2 only.

The arrays are written down by formula, not fitted, and the values expected are computed here with numpy from codes
that were never packed.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvq import storage
from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.bits import PackedCodes
from jaxvq.layout import Layout

FOLDER = Path(__file__).parent / "data"
NAME = "golden_v1.jaxvq.safetensors"


def numbers(shape, below, step=7):
    """Whole numbers in no particular order, from 0 to below - 1."""
    return (np.arange(np.prod(shape)) * step + np.arange(np.prod(shape)) // 5) % below


def codes_of(shape, below):
    return numbers(shape, below).reshape(shape)


def table(shape, dtype="float32"):
    """Values that every dtype holds exactly."""
    return ((numbers(shape, 61, 11) - 30) / 8).reshape(shape).astype(np.float32).astype(jnp.dtype(dtype))


def packed(codes, bits, axis=0):
    """Codes [g, out, m] as PackedCodes, by Python's own long integers."""
    lines = np.moveaxis(codes, axis, -1)
    words = -(-lines.shape[-1] * bits // 32)
    streams = (sum(int(code) << i * bits for i, code in enumerate(line)) for line in lines.reshape(-1, lines.shape[-1]))
    data = b"".join(stream.to_bytes(4 * words, "little") for stream in streams)
    array = np.frombuffer(data, "<u4").reshape(*lines.shape[:-1], words)
    return PackedCodes(jnp.asarray(np.moveaxis(array, -1, axis)), bits=bits, length=lines.shape[-1], axis=axis)


def affine(bits, shape, *, zero_point, axis_blocks=(1, 1), axis=0):
    layout = Layout.of(shape, "float32")
    codes = codes_of((*layout.grid, 1), 2**bits if zero_point or bits == 1 else 2**bits - 1)
    scale = np.abs(table((*axis_blocks, 1))) + 0.25
    zero = table((*axis_blocks, 1)) if zero_point else None
    offset = zero if zero_point else 2 ** (bits - 1) - 1 if bits > 1 else 0.5
    value = (codes - widen(offset, layout.grid)) * widen(scale, layout.grid)
    decoder = Affine(jnp.asarray(scale), None if zero is None else jnp.asarray(zero))
    return QuantizedArray(packed(codes, bits, axis), decoder, layout), value[..., 0].astype(np.float32)


def widen(blocks, grid):
    if np.ndim(blocks) == 0:
        return blocks
    return np.repeat(np.repeat(blocks, grid[0] // blocks.shape[0], 0), grid[1] // blocks.shape[1], 1)


def codebook(layout, k, *, bits, stages=1, blocks=(1, 1), dtype="float32", scale=None, axis=0):
    """A QuantizedArray, and its vectors [g, out, d]."""
    codes = codes_of((*layout.grid, stages), k)
    vectors = table((*blocks, stages, k, layout.dim))
    stored, factor = vectors, None
    if dtype == "int8":
        stored, factor = (vectors * 8).astype(np.int8), np.full((*blocks, stages, 1, 1), 0.125, np.float32) * scale
        vectors = vectors * scale
    wide = widen(vectors, layout.grid)
    g, out, m = np.ogrid[: codes.shape[0], : codes.shape[1], :stages]
    value = wide[g, out, m, codes].sum(2).astype(np.float32)
    decoder = Codebook(jnp.asarray(stored.astype(jnp.dtype(dtype))), None if factor is None else jnp.asarray(factor))
    return QuantizedArray(packed(codes, bits, axis), decoder, layout), value


def dense(vectors, rows):
    """[g, out, d] along the input side as a matrix [in, out]."""
    return vectors.transpose(0, 2, 1).reshape(-1, vectors.shape[1])[:rows]


def build():
    """(tree, expected values by name)"""
    tree, expected = {"affine": {}, "codebook": {}}, {}

    def add(group, name, pair):
        tree[group][name], expected[f"{group}/{name}"] = pair

    for bits in range(1, 9):
        add("affine", f"symmetric{bits}", affine(bits, (13, 3), zero_point=False))
        add("affine", f"uniform{bits}", affine(bits, (1, 37), zero_point=True, axis_blocks=(1, 37), axis=1))
    add("affine", "grouped3", affine(3, (12, 4), zero_point=True, axis_blocks=(3, 4)))

    array, value = codebook(Layout.of((23, 2), "float32"), 8, bits=3)
    add("codebook", "straddling3", (array, value[..., 0]))
    array, value = codebook(Layout.of((2, 40), "bfloat16"), 13, bits=4, blocks=(1, 40), dtype="bfloat16", axis=1)
    add("codebook", "channels_bf16", (array, value[..., 0].astype(jnp.bfloat16)))
    layout = Layout.of((10, 3), "float32", dim=4)
    array, value = codebook(layout, 5, bits=3, dtype="int8", scale=2.0)
    add("codebook", "product_int8", (array, dense(value, 10)))
    array, value = codebook(Layout.of((12, 5), "float16", dim=4), 6, bits=3, blocks=(3, 1), dtype="float16")
    add("codebook", "subspace_f16", (array, dense(value, 12).astype(np.float16)))
    array, value = codebook(Layout.of((8, 6), "float32", dim=2), 16, bits=4, stages=3, dtype="int8", scale=0.5, axis=1)
    add("codebook", "residual", (array, dense(value, 8)))
    array, value = codebook(Layout.of((5, 7), "float32", dim=4, along_out=True), 9, bits=5)
    add("codebook", "along_out", (array, value.reshape(5, 8)[:, :7]))
    array, value = codebook(Layout.of((4, 3, 3, 3), "float32", out_axis=0, channels_last=False, dim=9), 8, bits=3)
    add("codebook", "conv_oihw", (array, value.transpose(1, 0, 2).reshape(4, 3, 3, 3)))
    array, value = codebook(Layout.of((3, 3, 2, 5), "float32", dim=9), 8, bits=3)
    add("codebook", "conv_hwio", (array, value.transpose(2, 0, 1).reshape(3, 3, 2, 5)))
    layout = Layout.of((9, 4), "float32", dim=3)
    pairs = [codebook(layout, 11, bits=4, dtype="int8", scale=scale) for scale in (1, 4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(array for array, _ in pairs))
    add("codebook", "stacked", (stacked, np.stack([dense(value, 9) for _, value in pairs])))

    plain = {"bias": table((5,)), "half": table((2, 3), "bfloat16"), "step": np.array(7, np.int32)}
    tree["plain"] = [plain["bias"], {"half": plain["half"], "none": None}, {3: plain["step"]}]
    expected |= {"plain/0": plain["bias"], "plain/1/half": plain["half"], "plain/2/3": plain["step"]}
    return tree, expected


def make(folder):
    tree, expected = build()
    storage.save(folder / NAME, tree, metadata={"note": "golden"}, force=True)
    # numpy's own files know no bfloat16, and float32 holds all its values
    stored = {k: v.astype(np.float32) if v.dtype == jnp.bfloat16 else v for k, v in expected.items()}
    np.savez_compressed(folder / "golden_v1.npz", **stored)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
