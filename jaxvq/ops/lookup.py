"""Looking up entries of tables, and the gradient: each entry gets the sum over everything it stands for."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Integer

from jaxvq._numerics import matmul
from jaxvq.ops.nearest import chunk_length, in_chunks

Shape = tuple[int, int, int]
PIECES = 4
VALUES_PER_PIECE = 2**16  # a smaller piece is not worth its own program
VECTORS_PER_SUM = 16


@jax.custom_vjp
def lookup(tables: Float[Array, "g_blocks out_blocks k d"], codes: Integer[Array, "g out"]) -> Float[Array, "g out d"]:
    """The entries that codes name, `[g, out, d]`: each code reads the table of its block.

    The gradient of an entry is the sum over the codes that name it, added up in the same order on every run and
    backend. Codes have no gradient. Forward-mode differentiation is not defined.

    Args:
      tables: `[#g, #out, k, d]` in float32; each of the first two axes is 1 or divides the grid's.
      codes: `[g, out]`, each below `k`.

    Example:
      >>> table, codes = jnp.array([[[[1.0], [5.0]]]]), jnp.array([[0, 1], [1, 1]])
      >>> jax.grad(lambda table: lookup(table, codes).sum())(table).ravel()
      Array([1., 3.], dtype=float32)
    """
    (g_blocks, out_blocks, k, dim), groups = tables.shape, codes.shape[0]
    table = jnp.arange(groups, dtype=jnp.int32) // (groups // g_blocks)
    return tables.reshape(-1, dim).at[_rows(table, codes, out_blocks, k)].get(mode="clip")


def _lookup_forward(tables: Array, codes: Array) -> tuple[Array, tuple[Array, Array]]:
    # Codes wait for the backward pass in as few bytes as they fit in.
    small = jnp.uint8 if tables.shape[2] <= 2**8 else jnp.uint16
    return lookup(tables, codes), (tables, codes.astype(small))


def _lookup_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    tables, codes = kept
    g_blocks, out_blocks, k, _ = tables.shape
    return sums_by_entry(gradient, codes, (g_blocks, out_blocks, k)), None


lookup.defvjp(_lookup_forward, _lookup_backward)


# Jitted, so that layers of one shape are traced once.
@functools.partial(jax.jit, static_argnames="shape")
def sums_by_entry(
    values: Float[Array, "g out d"], codes: Integer[Array, "g out"], shape: Shape
) -> Float[Array, "g_blocks out_blocks k d"]:
    """Adds up the vectors of each block that share a code, for tables of `shape` (#g, #out, k).

    The sums are of float32 and have the same bits on every run.
    """
    on_cpu = functools.partial(scattered_sums, shape=shape)
    elsewhere = functools.partial(product_sums, shape=shape)
    return lax.platform_dependent(values, codes, cpu=on_cpu, default=elsewhere)


def scattered_sums(
    values: Float[Array, "g out d"], codes: Integer[Array, "g out"], shape: Shape
) -> Float[Array, "g_blocks out_blocks k d"]:
    """`sums_by_entry` for a processor, where a scatter adds in order and beats every sum that vectorizes.

    It adds thousands of values one after another to the same number, which loses digits, and runs on one core. So the
    rows of each block are cut into parts with tables of their own, of at least 16 vectors for each entry (the tables
    then take at most a sixteenth of what is added up), and the parts dealt out to scatters that run side by side.
    """
    (groups, outs, dim), (g_blocks, out_blocks, k) = values.shape, shape
    height = groups // g_blocks
    per_entry = height * outs // (out_blocks * k)
    rows_per_part = -(-height // max(1, per_entry // VECTORS_PER_SUM))
    parts = -(-height // rows_per_part)

    def first_row(part: int) -> int:
        return part // parts * height + min(part % parts * rows_per_part, height)

    def piece(first: int, last: int) -> Float[Array, "rows d"]:
        rows = slice(first_row(first), first_row(last))
        g = jnp.arange(rows.start, rows.stop, dtype=jnp.int32)
        table = g // height * parts + g % height // rows_per_part - first
        sums = jnp.zeros(((last - first) * out_blocks * k, dim), jnp.float32)
        return sums.at[_rows(table, codes[rows], out_blocks, k)].add(values[rows])

    count = min(PIECES, max(1, values.size // VALUES_PER_PIECE))
    cuts = [g_blocks * parts * i // count for i in range(count + 1)]
    pieces = [piece(first, last) for first, last in itertools.pairwise(cuts) if first < last]
    return jnp.concatenate(pieces).reshape(g_blocks, parts, out_blocks, k, dim).sum(axis=1)


def product_sums(
    values: Float[Array, "g out d"], codes: Integer[Array, "g out"], shape: Shape
) -> Float[Array, "g_blocks out_blocks k d"]:
    """`sums_by_entry` for an accelerator, whose scatter adds in no fixed order: products with one-hot codes."""
    (groups, outs, dim), (g_blocks, out_blocks, k) = values.shape, shape
    grid = (g_blocks, groups // g_blocks, out_blocks, outs // out_blocks)
    vectors = values.reshape(*grid, dim).transpose(0, 2, 1, 3, 4).reshape(g_blocks * out_blocks, -1, dim)
    names = codes.reshape(grid).transpose(0, 2, 1, 3).reshape(g_blocks * out_blocks, -1)
    # As many tables at once as there is room for in a chunk.
    at_once = max(1, chunk_length(groups * outs, k) // chunk_length(vectors.shape[1], k))
    sums = lax.map(lambda table: one_hot_sums(table[0], table[1], k), (vectors, names), batch_size=at_once)
    return sums.reshape(*shape, dim)


def one_hot_sums(values: Float[Array, "n e"], codes: Integer[Array, " n"], k: int) -> Float[Array, "k e"]:
    """Adds up the rows of `values` that share a code, as products with one-hot codes, a chunk at a time."""
    length = chunk_length(values.shape[0], k)

    def add(sums: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        one_hot = jax.nn.one_hot(chunk[1][:, 0], k, axis=0, dtype=jnp.float32)
        return sums + matmul(one_hot, chunk[0]), None

    chunks = in_chunks(values, length), in_chunks(codes[:, None], length)
    return lax.scan(add, jnp.zeros((k, values.shape[1]), jnp.float32), chunks)[0]


def _rows(table: Int32[Array, " g"], codes: Integer[Array, "g out"], out_blocks: int, k: int) -> Int32[Array, "g out"]:
    """Which row of all tables, one below the other, each code names; `table` is that of each row of the grid."""
    outs = codes.shape[1]
    out = jnp.arange(outs, dtype=jnp.int32) // (outs // out_blocks)
    return (table[:, None] * out_blocks + out) * k + codes.astype(jnp.int32)
