"""From a weight to its codes: the jitted steps that the methods are put together from.

Only the cluster programs depend on the number of points, and they see it padded to a bucket; the steps before and
after them depend on the layout and are small.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from jaxvq._blocks import (
    VALUES_AT_ONCE,
    Blocks,
    block_values,
    from_blocks,
    slab_of,
    slabs_of,
    to_blocks,
    with_columns,
)
from jaxvq._numerics import as_storage, from_storage, safe_divide
from jaxvq.array import Affine, Codebook, QuantizedArray, spread, symmetric_zero
from jaxvq.bits import pack, zero_codes
from jaxvq.cluster.buckets import bucket, pad_problems
from jaxvq.cluster.palettes import fit_palettes
from jaxvq.cluster.product import fit_product
from jaxvq.cluster.residual import encode_residual, fit_residual
from jaxvq.cluster.scalar import nearest1d, thin
from jaxvq.layout import Layout
from jaxvq.ops.nearest import nearest

Decoder = Affine | Codebook
SAMPLE_ABOVE = 2**22
SAMPLE_VECTORS = 2**20
SAMPLE_VECTORS_PER_ENTRY = 2**12
LEAST_IMPORTANCE = 1e-6
SAMPLE_BLOCKS = 2**18
SAMPLE_BLOCKS_PER_ENTRY = 2**8
SAMPLE_BLOCKS_MOST = 2**21  # three values each, which float32 can still count


def code_bits(k: int) -> int:
    """Bits that a code of `k` entries takes; one entry takes one bit too."""
    return max(1, (k - 1).bit_length())


def uniform(weight: Float[Array, "..."], *, layout: Layout, blocks: Blocks, bits: int) -> Affine:
    """Evenly spaced levels between the extremes of each block."""
    low, high = _extremes(weight, layout=layout, blocks=blocks)
    scale = _step(low, high, 2**bits - 1)
    return Affine(scale, -low / scale)


def symmetric(weight: Float[Array, "..."], *, layout: Layout, blocks: Blocks, bits: int) -> Affine:
    """Evenly spaced levels around zero, in each block."""
    if bits == 1:
        whole = blocks == (1, 1)
        size = (
            _mean_size_of_all(weight) if whole else _by_columns(_mean_size, weight, None, layout=layout, blocks=blocks)
        )
        # The scale of an `Affine` is the distance of its levels, which lie at plus and minus the mean size.
        return Affine(2 * size)
    return Affine(_step(*_extremes(weight, layout=layout, blocks=blocks), int(2 * symmetric_zero(bits))))


def palettes(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, *, layout: Layout, blocks: Blocks, k: int
) -> Float[Array, "g_blocks out_blocks 1 k 1"]:
    """The optimal codebook of each block's values."""
    if blocks == (1, 1):
        return _whole_palette(weight, weights, layout=layout, k=k)
    fit = functools.partial(_column_palettes, k=k)
    return _by_columns(fit, weight, weights, layout=layout, blocks=blocks)


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
    sample_key, key = jax.random.split(key)
    points, mass, count = _vector_problems(weight, weights, sample_key, layout=layout, subspaces=subspaces, k=k)
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
    sample_key, key = jax.random.split(key)
    points, mass, count = _vector_problems(weight, weights, sample_key, layout=layout, subspaces=False, k=k)
    codebooks = fit_residual(
        key, points[0], k, stages, weights=None if mass is None else mass[0], iterations=iterations, count=count
    )
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
def importance_of(weights: Float[Array, "..."] | None, *, layout: Layout) -> Float[Array, "..."] | None:
    """The importance that a method clusters with, at most 1; None where every value counts the same.

    What counts nothing gets next to nothing, so that an unused channel still becomes something like itself. Vectors
    with padding in them need a weight for each value, because the padding has none.
    """
    if weights is None:
        return jnp.ones(layout.shape, jnp.float32) if layout.pad and layout.dim > 1 else None
    largest = jnp.max(weights)
    return jnp.where(largest > 0, jnp.maximum(safe_divide(weights, largest), LEAST_IMPORTANCE), 1)


@functools.partial(jax.jit, static_argnames=("layout", "bits"))
def encode(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, decoder: Decoder, *, layout: Layout, bits: int
) -> QuantizedArray:
    """The nearest codes of a decoder as it is stored, packed, some output columns at a time."""
    stages = 1 if isinstance(decoder, Affine) else decoder.vectors.shape[2]
    groups, outs = layout.grid
    zeros = zero_codes(groups, outs, stages, bits)
    columns = min(outs, max(1, VALUES_AT_ONCE // (groups * layout.dim)))
    slab_layout = with_columns(layout, columns)
    # Packed along `out`, a word holds codes of several columns: those are few enough to be packed at the end.
    pack_each = zeros.axis == 0

    def some(step: Integer[Array, ""], result: Array) -> Array:
        start = jnp.minimum(step * columns, outs - columns)
        slab, importance = slab_of(weight, weights, start, layout=layout, columns=columns)
        vectors = slab_layout.to_vectors(slab)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=columns, axis=1)
        part = jax.tree.map(lambda leaf: leaf if leaf.shape[1] == 1 else cut(leaf), decoder)
        if isinstance(part, Affine):
            codes = _affine_codes(vectors, part, bits)
        else:
            mass = None if importance is None or layout.dim == 1 else slab_layout.to_vectors(importance)
            codes = _codebook_codes(vectors, mass, part)
        update = pack(codes, bits, axis=0).words if pack_each else codes.astype(jnp.uint32)
        return jax.lax.dynamic_update_slice_in_dim(result, update, start, axis=1)

    start = zeros.words if pack_each else jnp.zeros((groups, outs, stages), jnp.uint32)
    result = jax.lax.fori_loop(0, -(-outs // columns), some, start)
    codes = dataclasses.replace(zeros, words=result) if pack_each else pack(result, bits, axis=1)
    return QuantizedArray(codes, decoder, layout)


def _affine_codes(vectors: Shaped[Array, "g out 1"], decoder: Affine, bits: int) -> Integer[Array, "g out 1"]:
    grid = (vectors.shape[0], vectors.shape[1])
    scale = spread(decoder.scale, grid)
    zero = symmetric_zero(bits) if decoder.zero_point is None else spread(decoder.zero_point, grid)
    level = safe_divide(vectors.astype(jnp.float32), jnp.broadcast_to(scale, vectors.shape)) + zero
    # At one bit the two levels lie beside zero, which counts as positive.
    code = jnp.floor(level + 0.5) if bits == 1 and decoder.zero_point is None else jnp.round(level)
    return jnp.clip(code, 0, decoder.entries(bits) - 1).astype(jnp.uint32)


def _codebook_codes(
    vectors: Shaped[Array, "g out d"], importance: Shaped[Array, "g out d"] | None, decoder: Codebook
) -> Integer[Array, "g out m"]:
    """The code of the nearest entry for each vector, from the table of its block."""
    groups, outs, dim = vectors.shape
    tables = decoder.vectors.astype(jnp.float32)
    if decoder.scale is not None:
        tables = tables * decoder.scale
    blocks, stages = (tables.shape[0], tables.shape[1]), tables.shape[2]
    points = to_blocks(vectors, blocks)
    mass = None if importance is None else to_blocks(importance, blocks)

    def one(block: tuple[Array, Array | None, Array]) -> Integer[Array, "n m"]:
        x, w, table = block
        if stages > 1:
            return encode_residual(x, table, weights=w)
        if dim == 1:
            return nearest1d(x[:, 0], table[0, :, 0])[:, None]
        return nearest(x, table[0], weights=w)[:, None]

    solve = jax.vmap(one) if dim == 1 else functools.partial(jax.lax.map, one)
    return from_blocks(solve((points, mass, tables.reshape(-1, *tables.shape[2:]))), blocks, (groups, outs))


def _extremes(
    weight: Float[Array, "..."], *, layout: Layout, blocks: Blocks
) -> tuple[Float[Array, "g_blocks out_blocks 1"], Float[Array, "g_blocks out_blocks 1"]]:
    if blocks == (1, 1):
        return tuple(f(weight).astype(jnp.float32).reshape(1, 1, 1) for f in (jnp.min, jnp.max))  # type: ignore[return-value]
    both = _by_columns(_block_extremes, weight, None, layout=layout, blocks=blocks)
    return both[..., :1], both[..., 1:]


@functools.partial(jax.jit, static_argnames="steps")
def _step(low: Float[Array, "..."], high: Float[Array, "..."], steps: int) -> Float[Array, "..."]:
    """The distance of levels, such that a constant is one of them.

    Jitted, because a compiler may divide otherwise than a single operation does.
    """
    step = (high - low) / steps
    return jnp.where(step > 0, step, jnp.where(high == 0, 1, jnp.abs(high)))


def _by_columns(
    fit: Callable[..., Float[Array, "g_blocks some_blocks *rest"]],
    weight: Float[Array, "..."],
    weights: Float[Array, "..."] | None,
    *,
    layout: Layout,
    blocks: Blocks,
) -> Float[Array, "g_blocks out_blocks *rest"]:
    """`fit` over slabs of output columns, put together: all problems at once would take several times the memory."""
    assert blocks[1] == layout.grid[1], "slabs of columns cannot share a block"
    parts = [
        fit(*slab_of(weight, weights, start, layout=layout, columns=columns), layout=slab, blocks=(blocks[0], columns))
        for start, columns, slab in slabs_of(layout)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


@jax.jit
def _mean_size_of_all(weight: Float[Array, "..."]) -> Float[Array, "1 1 1"]:
    return jnp.mean(jnp.abs(weight), dtype=jnp.float32).reshape(1, 1, 1)


@functools.partial(jax.jit, static_argnames=("layout", "blocks"))
def _mean_size(
    weight: Float[Array, "..."], weights: None, *, layout: Layout, blocks: Blocks
) -> Float[Array, "g_blocks out_blocks 1"]:
    values, real = block_values(weight, weights, layout, blocks)
    return safe_divide(jnp.sum(jnp.abs(values) * real, axis=1), jnp.sum(real, axis=1)).reshape(*blocks, 1)


@functools.partial(jax.jit, static_argnames=("layout", "blocks"))
def _block_extremes(
    weight: Float[Array, "..."], weights: None, *, layout: Layout, blocks: Blocks
) -> Float[Array, "g_blocks out_blocks 2"]:
    values, real = block_values(weight, weights, layout, blocks)
    low = jnp.min(jnp.where(real > 0, values, jnp.inf), axis=1)
    high = jnp.max(jnp.where(real > 0, values, -jnp.inf), axis=1)
    return jnp.stack([low, high], axis=1).reshape(*blocks, 2)


def _column_palettes(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, *, layout: Layout, blocks: Blocks, k: int
) -> Float[Array, "g_blocks out_blocks 1 k 1"]:
    problems = blocks[0] * blocks[1]
    points, mass, count = _palette_problems(weight, weights, layout=layout, blocks=blocks)
    return fit_palettes(points, k, weights=mass, problems=problems, count=count)[:problems].reshape(*blocks, 1, k, 1)


def _whole_palette(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, *, layout: Layout, k: int
) -> Float[Array, "1 1 1 k 1"]:
    blocks = min(max(SAMPLE_BLOCKS, SAMPLE_BLOCKS_PER_ENTRY * k), SAMPLE_BLOCKS_MOST)
    block = -(-layout.size // blocks) if layout.size > SAMPLE_ABOVE else 1
    samples = [
        _sample(*slab_of(weight, weights, start, layout=layout, columns=columns), layout=slab, block=block)
        for start, columns, slab in slabs_of(layout)
    ]
    points = jnp.concatenate([values for values, _ in samples])[None]
    mass = None if samples[0][1] is None else jnp.concatenate([mass for _, mass in samples])[None]
    padded, padded_mass = pad_problems(points, mass)
    codebook = fit_palettes(padded, k, weights=padded_mass, problems=1, count=points.shape[1])
    return codebook.reshape(1, 1, 1, k, 1)


@functools.partial(jax.jit, static_argnames=("layout", "block"))
def _sample(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, *, layout: Layout, block: int
) -> tuple[Float[Array, " s"], Float[Array, " s"] | None]:
    values, mass = (rows[0] for rows in block_values(weight, weights, layout, (1, 1)))
    if block > 1:
        return thin(values, mass, block)
    return values, None if _counts_all(weights, layout) else mass


@functools.partial(jax.jit, static_argnames=("layout", "blocks"))
def _palette_problems(
    weight: Float[Array, "..."], weights: Float[Array, "..."] | None, *, layout: Layout, blocks: Blocks
) -> tuple[Float[Array, "p n"], Float[Array, "p n"] | None, Integer[Array, ""]]:
    """The values to cluster, their importance where they do not all count 1, and how many of them are no padding."""
    values, mass = block_values(weight, weights, layout, blocks)
    thinned = values.shape[1] > SAMPLE_ABOVE
    if thinned:
        values, mass = jax.vmap(functools.partial(thin, block=-(-values.shape[1] // SAMPLE_BLOCKS)))(values, mass)
    points, mass = pad_problems(values, None if _counts_all(weights, layout) and not thinned else mass)
    return points, mass, jnp.int32(values.shape[1])


def _counts_all(weights: Float[Array, "..."] | None, layout: Layout) -> bool:
    """Whether every value of every block counts 1."""
    return weights is None and layout.pad == 0


@functools.partial(jax.jit, static_argnames=("layout", "subspaces", "k"))
def _vector_problems(
    weight: Float[Array, "..."],
    weights: Float[Array, "..."] | None,
    key: Array,
    *,
    layout: Layout,
    subspaces: bool,
    k: int,
) -> tuple[Shaped[Array, "p n d"], Float[Array, "p n d"] | None, Integer[Array, ""]]:
    """The vectors to cluster, their importance, and how many of them are no padding.

    Of more than a million vectors, and 4096 per entry, a random sample of so many is clustered. A centroid is the mean
    of its vectors, so the excess squared error is about one part in 4096.
    """
    blocks = (layout.grid[0] if subspaces else 1, 1)
    vectors = math.prod(layout.grid) // blocks[0]
    count = min(vectors, max(SAMPLE_VECTORS, SAMPLE_VECTORS_PER_ENTRY * k))
    # One vector from each of `count` stretches that cover all of them; the first `longer` have one vector more.
    length, longer = divmod(vectors, count)
    index = jnp.arange(count, dtype=jnp.int32)
    starts = index * length + jnp.minimum(index, longer)
    rows = starts + jax.random.randint(key, (count,), 0, jnp.where(index < longer, length + 1, length), jnp.int32)

    def problems(values: Shaped[Array, "..."]) -> Shaped[Array, "p n d"]:
        points = to_blocks(layout.to_vectors(as_storage(values)), blocks)
        points = points if count == vectors else points[:, rows]
        padded = jnp.pad(points, ((0, 0), (0, bucket(count) - count), (0, 0)))
        return from_storage(padded, values.dtype)

    return problems(weight), None if weights is None else problems(weights), jnp.int32(count)
