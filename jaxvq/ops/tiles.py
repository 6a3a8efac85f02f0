"""The product with a weight that is decoded a tile at a time, for processors that reach their cache faster than memory.

The tile is multiplied while it is in the cache, and its room is used again for the next: the decoded weight never is in
memory as a whole, which would take longer to write than all else.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxvq.array import QuantizedArray, as_floats
from jaxvq.bits import WORD

TILE_VALUES = 2**19
ROWS_MOST = 16  # with more, the product takes longer than decoding


def tile_count(rows: int, w: QuantizedArray) -> int | None:
    """How many tiles of the input side to decode for a product of so many rows; None where all at once is as well.

    It is for several stages, which XLA adds up more slowly in tiles. The codes must follow each other along the input
    side.
    """
    inputs, outs = w.layout.matrix_shape
    length, stages = w.codes.length, w.codes.words.shape[2]
    if not 0 < rows <= ROWS_MOST or stages > 1 or length * w.layout.dim != inputs:
        return None
    least = -(-inputs * outs // TILE_VALUES)
    blocks = {leaf.shape[0] for leaf in jax.tree.leaves(w.decoder)} - {1}
    if least < 2:
        return None
    for count in (*range(least, 2 * least), *range(least - 1, 1, -1)):
        whole = length % count == 0 and length // count * w.codes.bits % WORD == 0
        if whole and all(block % count == 0 for block in blocks):
            return count
    return None


# Jitted, so that calls outside of jit are compiled once.
@functools.partial(jax.jit, static_argnames=("count", "precision"))
def tiled_product(
    x: Float[Array, "n a"], w: QuantizedArray, *, count: int, precision: lax.PrecisionLike
) -> Float[Array, "n b"]:
    """`x` times the layout's matrix of `w`, which is decoded in `count` tiles; see `tile_count`."""
    inputs, outs = w.layout.matrix_shape
    layout = dataclasses.replace(w.layout, shape=(inputs // count, outs), in_axis=0, out_axis=1)
    sums = jnp.promote_types(x.dtype, jnp.float32)

    def parts_of(leaf: Array) -> Array:
        return leaf.reshape(count, -1, *leaf.shape[1:])

    def product(tile: tuple[Array, Array, Any]) -> Array:
        x, words, blocks = tile
        decoder = jax.tree.map(lambda leaf, own: leaf if own is None else own, w.decoder, blocks)
        codes = dataclasses.replace(w.codes, words=words, length=w.codes.length // count)
        weight = as_floats(QuantizedArray(codes, decoder, layout), x.dtype)
        return jnp.matmul(x, weight, precision=precision, preferred_element_type=sums)

    blocks = jax.tree.map(lambda leaf: parts_of(leaf) if leaf.shape[0] > 1 else None, w.decoder)
    parts_of_x = x.reshape(x.shape[0], count, -1).transpose(1, 0, 2)
    return lax.map(product, (parts_of_x, parts_of(w.codes.words), blocks)).sum(axis=0).astype(x.dtype)
