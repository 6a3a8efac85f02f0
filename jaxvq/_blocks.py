"""Parts of a weight: slabs of output columns, which bound the memory, and blocks of values that share a table.

A grid of vectors `[g, out, d]` is cut into `(g_blocks, out_blocks)` blocks, each a clustering problem of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from jaxvq._numerics import as_storage, from_storage
from jaxvq.layout import Layout

Blocks = tuple[int, int]
VALUES_AT_ONCE = 2**20


def slabs_of(layout: Layout) -> list[tuple[int, int, Layout]]:
    """(first column, columns, layout) of slabs of about a million values."""
    rows, outs = layout.matrix_shape
    if layout.out_axis is None or layout.size <= VALUES_AT_ONCE:
        return [(0, outs, layout)]
    most = max(1, VALUES_AT_ONCE // rows)
    slabs = []
    for start in range(0, outs, most):
        columns = min(most, outs - start)
        slabs.append((start, columns, with_columns(layout, columns)))
    return slabs


def with_columns(layout: Layout, columns: int) -> Layout:
    """The layout of some columns of the weight."""
    if layout.out_axis is None:
        return layout
    shape = (*layout.shape[: layout.out_axis], columns, *layout.shape[layout.out_axis + 1 :])
    return dataclasses.replace(layout, shape=shape)


@functools.partial(jax.jit, static_argnames=("layout", "columns"))
def slab_of(
    weight: Float[Array, "..."],
    weights: Float[Array, "..."] | None,
    start: Integer[Array, ""] | int,
    *,
    layout: Layout,
    columns: int,
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Some columns of a weight and of its importance."""
    if layout.out_axis is None:
        return weight, weights

    def cut(values: Array) -> Array:
        stored = as_storage(values)
        part = jax.lax.dynamic_slice_in_dim(stored, start_index=start, slice_size=columns, axis=layout.out_axis or 0)
        return from_storage(part, values.dtype)

    return jax.tree.map(cut, (weight, weights))


def block_values(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, layout: Layout, blocks: Blocks
) -> tuple[Float[Array, "p n"], Float[Array, "p n"]]:
    """The values of each block and their importance, which is 0 for padding."""
    values = to_blocks(layout.to_vectors(weight), blocks)[..., 0].astype(jnp.float32)
    importance = jnp.ones(layout.shape, jnp.float32) if weights is None else weights
    return values, to_blocks(layout.to_vectors(importance), blocks)[..., 0].astype(jnp.float32)


def to_blocks(vectors: Shaped[Array, "g out d"], blocks: Blocks) -> Shaped[Array, "p n d"]:
    """The vectors of each block of the grid in a row of their own."""
    groups, outs, dim = vectors.shape
    cut = vectors.reshape(blocks[0], groups // blocks[0], blocks[1], outs // blocks[1], dim)
    return cut.transpose(0, 2, 1, 3, 4).reshape(blocks[0] * blocks[1], -1, dim)


def from_blocks(rows: Shaped[Array, "p n m"], blocks: Blocks, grid: tuple[int, int]) -> Shaped[Array, "g out m"]:
    """Undoes `to_blocks`."""
    (groups, outs), stages = grid, rows.shape[2]
    cut = rows.reshape(*blocks, groups // blocks[0], outs // blocks[1], stages)
    return cut.transpose(0, 2, 1, 3, 4).reshape(groups, outs, stages)
