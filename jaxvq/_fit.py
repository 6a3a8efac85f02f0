"""From a weight to its codes: the jitted steps that the methods are put together from.

Only the cluster programs depend on the number of points, and they see it padded to a bucket; the steps before and
after them depend on the layout and are small.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from jaxvq._numerics import safe_divide
from jaxvq.array import Affine, Codebook, QuantizedArray, spread, symmetric_zero
from jaxvq.bits import pack, zero_codes
from jaxvq.cluster.buckets import map_problems, pad_problems
from jaxvq.cluster.product import fit_product
from jaxvq.cluster.residual import encode_residual, fit_residual
from jaxvq.cluster.scalar import grid_size, kmeans1d, nearest1d, thin
from jaxvq.layout import Layout
from jaxvq.ops.nearest import nearest

Blocks = tuple[int, int]
CODES_AT_ONCE = 2**20
COSTS_AT_ONCE = 2**21


def code_bits(k: int) -> int:
    """Bits that a code of `k` entries takes; one entry takes one bit too."""
    return max(1, (k - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("layout", "blocks", "bits"))
def uniform(weight: Float[Array, "..."], *, layout: Layout, blocks: Blocks, bits: int) -> QuantizedArray:
    """Evenly spaced levels between the extremes of each block."""
    values, real = _block_values(weight, None, layout, blocks)
    low = jnp.min(jnp.where(real > 0, values, jnp.inf), axis=1)
    high = jnp.max(jnp.where(real > 0, values, -jnp.inf), axis=1)
    step = (high - low) / (2**bits - 1)
    scale = jnp.where(step > 0, step, 1).reshape(*blocks, 1)
    vectors = layout.to_vectors(weight).astype(jnp.float32)
    levels = (vectors - spread(low.reshape(*blocks, 1), layout.grid)) / spread(scale, layout.grid)
    codes = jnp.clip(jnp.round(levels), 0, 2**bits - 1).astype(jnp.uint32)
    return QuantizedArray(pack(codes, bits), Affine(scale, -low.reshape(*blocks, 1) / scale), layout)


@functools.partial(jax.jit, static_argnames=("layout", "blocks", "bits"))
def symmetric(weight: Float[Array, "..."], *, layout: Layout, blocks: Blocks, bits: int) -> QuantizedArray:
    """Evenly spaced levels around zero, in each block."""
    values, real = _block_values(weight, None, layout, blocks)
    vectors = layout.to_vectors(weight).astype(jnp.float32)
    if bits == 1:
        # The scale of an `Affine` is the distance of its levels, which lie at plus and minus the mean size.
        scale = 2 * safe_divide(jnp.sum(jnp.abs(values) * real, axis=1), jnp.sum(real, axis=1))
        codes = (vectors >= 0).astype(jnp.uint32)
        return QuantizedArray(pack(codes, bits), Affine(scale.reshape(*blocks, 1)), layout)
    low = jnp.min(jnp.where(real > 0, values, jnp.inf), axis=1)
    high = jnp.max(jnp.where(real > 0, values, -jnp.inf), axis=1)
    most = symmetric_zero(bits)
    scale = ((high - low) / (2 * most)).reshape(*blocks, 1)
    levels = safe_divide(vectors, jnp.broadcast_to(spread(scale, layout.grid), vectors.shape))
    codes = (jnp.clip(jnp.round(levels), -most, most) + most).astype(jnp.uint32)
    return QuantizedArray(pack(codes, bits), Affine(scale), layout)


def palettes(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, *, layout: Layout, blocks: Blocks, k: int
) -> Float[Array, "g_blocks out_blocks 1 k 1"]:
    """The optimal codebook of each block's values."""
    points, mass = _palette_problems(weight, weights, layout=layout, blocks=blocks)
    codebooks = fit_palettes(points, mass, blocks[0] * blocks[1], k=k)
    return codebooks[: blocks[0] * blocks[1]].reshape(*blocks, 1, k, 1)


def product(
    weight: Float[Array, "..."],
    weights: Float[Array, "..."] | None,
    key: Array,
    *,
    layout: Layout,
    subspaces: bool,
    k: int,
    iterations: int,
) -> Float[Array, "#g 1 1 k d"]:
    """A codebook of vectors: one for all, or one for each place along the input side."""
    points, mass, count = _vector_problems(weight, weights, layout=layout, subspaces=subspaces)
    codebooks = fit_product(key, points, k, weights=mass, iterations=iterations, count=count)
    return codebooks[:, None, None]


def residual(
    weight: Float[Array, "..."],
    weights: Float[Array, "..."] | None,
    key: Array,
    *,
    layout: Layout,
    k: int,
    stages: int,
    iterations: int,
) -> Float[Array, "1 1 m k d"]:
    """A codebook for each stage, one set for the whole weight."""
    points, mass, count = _vector_problems(weight, weights, layout=layout, subspaces=False)
    codebooks = fit_residual(key, points[0], k, stages, weights=mass[0], iterations=iterations, count=count)
    return codebooks[None, None]


@functools.partial(jax.jit, static_argnames="dtype")
def round_codebook(vectors: Float[Array, "g_blocks out_blocks m k d"], dtype: str) -> Codebook:
    """The codebook as it is stored: int8 entries are whole multiples of a scale per table and stage."""
    if dtype != "int8":
        return Codebook(vectors.astype(dtype))
    largest = jnp.max(jnp.abs(vectors), axis=(3, 4), keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return Codebook(jnp.round(vectors / scale).astype(jnp.int8), scale)


@functools.partial(jax.jit, static_argnames="layout")
def encode(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, codebook: Codebook, *, layout: Layout
) -> QuantizedArray:
    """The codes of the nearest entries of a codebook as it is stored, packed, some output columns at a time."""
    tables = codebook.vectors.astype(jnp.float32)
    if codebook.scale is not None:
        tables = tables * codebook.scale
    stages, k = tables.shape[2:4]
    groups, outs = layout.grid
    vectors = layout.to_vectors(weight)
    importance = None if weights is None or layout.dim == 1 else layout.to_vectors(weights)
    zeros = zero_codes(groups, outs, stages, code_bits(k))
    # Packed along `out`, a word holds codes of several columns, so the columns cannot be packed apart.
    columns = outs if zeros.axis == 1 else min(outs, max(1, CODES_AT_ONCE // groups))

    def some(step: Integer[Array, ""], words: Array) -> Array:
        start = jnp.minimum(step * columns, outs - columns)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=columns, axis=1)
        part = tables if tables.shape[1] == 1 else cut(tables)
        codes = _codes(cut(vectors), None if importance is None else cut(importance), part)
        packed = pack(codes, zeros.bits, axis=zeros.axis)
        return packed.words if zeros.axis else jax.lax.dynamic_update_slice_in_dim(words, packed.words, start, axis=1)

    steps = -(-outs // columns)
    words = jax.lax.fori_loop(0, steps, some, zeros.words)
    return QuantizedArray(dataclasses.replace(zeros, words=words), codebook, layout)


def _codes(
    vectors: Shaped[Array, "g out d"],
    importance: Shaped[Array, "g out d"] | None,
    tables: Float[Array, "g_blocks out_blocks m k d"],
) -> Integer[Array, "g out m"]:
    """The code of the nearest entry for each vector, from the tables of its block."""
    groups, outs, dim = vectors.shape
    blocks, stages = (tables.shape[0], tables.shape[1]), tables.shape[2]
    points = _to_blocks(vectors, blocks)
    tables = tables.reshape(-1, *tables.shape[2:])
    mass = None if importance is None else _to_blocks(importance, blocks)

    def one(block: tuple[Array, Array | None, Array]) -> Integer[Array, "n m"]:
        x, w, table = block
        if stages > 1:
            return encode_residual(x, table, weights=w)
        if dim == 1:
            return nearest1d(x[:, 0], table[0, :, 0])[:, None]
        return nearest(x, table[0], weights=w)[:, None]

    solve = jax.vmap(one) if dim == 1 else functools.partial(jax.lax.map, one)
    return _from_blocks(solve((points, mass, tables)), blocks, (groups, outs))


@functools.partial(jax.jit, static_argnames=("layout", "blocks"))
def _palette_problems(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, *, layout: Layout, blocks: Blocks
) -> tuple[Float[Array, "p n"], Float[Array, "p n"]]:
    values, mass = _block_values(weight, weights, layout, blocks)
    return pad_problems(*jax.vmap(thin)(values, mass))


@functools.partial(jax.jit, static_argnames=("layout", "subspaces"))
def _vector_problems(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, *, layout: Layout, subspaces: bool
) -> tuple[Float[Array, "p n d"], Float[Array, "p n *w"], Integer[Array, ""]]:
    blocks = (layout.grid[0] if subspaces else 1, 1)
    points = _to_blocks(layout.to_vectors(weight), blocks)
    mass = jnp.ones(points.shape[:2]) if weights is None else _to_blocks(layout.to_vectors(weights), blocks)
    count = jnp.int32(points.shape[1])
    padded, mass = pad_problems(points.astype(jnp.float32), mass)
    # Padding the number of problems would cluster for nothing.
    return padded[: blocks[0]], mass[: blocks[0]], count


@functools.partial(jax.jit, static_argnames="k")
def fit_palettes(
    points: Float[Array, "p n"], mass: Float[Array, "p n"], count: Integer[Array, ""] | int, *, k: int
) -> Float[Array, "p k"]:
    """The optimal codebooks of the first `count` problems: the one program that `KMeans` compiles per bucket."""
    at_once = max(1, COSTS_AT_ONCE // grid_size(points.shape[1], k) ** 2)
    return map_problems(lambda x, w: kmeans1d(x, k, weights=w), jnp.asarray(count), at_once, points, mass)


def _block_values(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, layout: Layout, blocks: Blocks
) -> tuple[Float[Array, "p n"], Float[Array, "p n"]]:
    """The values of each block and their importance, which is 0 for padding."""
    values = _to_blocks(layout.to_vectors(weight), blocks)[..., 0].astype(jnp.float32)
    importance = jnp.ones(layout.shape) if weights is None else weights
    return values, _to_blocks(layout.to_vectors(importance), blocks)[..., 0].astype(jnp.float32)


def _to_blocks(vectors: Shaped[Array, "g out d"], blocks: Blocks) -> Shaped[Array, "p n d"]:
    """The vectors of each block of the grid in a row of their own."""
    groups, outs, dim = vectors.shape
    cut = vectors.reshape(blocks[0], groups // blocks[0], blocks[1], outs // blocks[1], dim)
    return cut.transpose(0, 2, 1, 3, 4).reshape(blocks[0] * blocks[1], -1, dim)


def _from_blocks(rows: Shaped[Array, "p n m"], blocks: Blocks, grid: tuple[int, int]) -> Shaped[Array, "g out m"]:
    """Undoes `_to_blocks`."""
    (groups, outs), stages = grid, rows.shape[2]
    cut = rows.reshape(*blocks, groups // blocks[0], outs // blocks[1], stages)
    return cut.transpose(0, 2, 1, 3, 4).reshape(groups, outs, stages)
