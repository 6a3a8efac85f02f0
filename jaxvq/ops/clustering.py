"""What k-means spends its time on, as kernels for NVIDIA's chips (compute capability 8.0 and later).

Each has its XLA twin where it is used, which serves everywhere else: `nearest` in `ops/nearest.py`, `sums_by_code` in
`cluster/kmeans.py`, `palettes` in `cluster/palettes.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, UInt32

from jaxvq._numerics import scale_up_to
from jaxvq.ops import cuda

WARPS = 8
ROUNDED_ABOVE = 16
STEPS_MOST = 16
EXPONENT = 8
FAR_OUTSIDE = 64
ENTRIES_MOST = 1024
ROUNDS = 2
ITERATIONS = 100
COPIES_MOST = 256
NUMBERS_APART = 2**15  # so many can be added to at once without waiting
PROCESSORS = 132  # of an H100; more blocks of threads than run at once only take turns


def supports_nearest(d: int, *, exact: bool) -> bool:
    """Whether there is a kernel, on this machine, for vectors of `d` values."""
    return cuda.compiler() is not None and cuda.shared_nbytes() > 0 and _steps(d, exact) <= STEPS_MOST


def supports_palettes(k: int, grid: int) -> bool:
    """Whether there is a kernel, on this machine, for palettes of `k` entries whose cuts are chosen from a grid."""
    return cuda.compiler() is not None and k <= ENTRIES_MOST and _palette_nbytes(k, grid) <= cuda.shared_nbytes()


def _palette_nbytes(k: int, grid: int) -> int:
    """Shared memory for a row: what the grid takes; moments, centroids and cuts, which the source declares."""
    return _grid_nbytes(grid) + 36 * (k + 1) + 64


def _grid_nbytes(grid: int) -> int:
    """Moments, least errors and edges of a grid."""
    return (5 * 8 + 4) * (grid + 1)


def _passes(d: int, exact: bool) -> int:
    return 3 if exact or d <= ROUNDED_ABOVE else 1


def _steps(d: int, exact: bool) -> int:
    return -(-_passes(d, exact) * d // 16)


def nearest(
    points: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    *,
    largest: Float[Array, ""],
    exact: bool,
    count: Int[Array, ""] | int | None = None,
) -> Int32[Array, " n"]:
    """The nearest codebook vector of each point, both centred; a tie goes to the lower index, NaN to 0.

    Args:
      points: `[n, d]`.
      codebook: `[k, d]`.
      largest: about the size of the largest value; what is over 200 times larger counts as that.
      exact: with float32's digits. Otherwise values of vectors of more than 16 are rounded to 11 bits, as in
        half precision or TF32: three times as fast, and next to the distances of so many values that is little.
      count: only this many leading points need a code.
    """
    (n, d), k = points.shape, codebook.shape[0]
    passes, steps = _passes(d, exact), _steps(d, exact)
    chunk = 16 if steps <= 4 else 8 if steps <= 8 else 4
    row_tiles = 4 if steps == 1 else 2 if steps <= 8 else 1
    group = min(8 if k > 1024 else 2, chunk)
    tiles = -(-k // (8 * chunk)) * chunk
    # Half precision reaches from 2**-24 to 2**16, and a power of two keeps every digit.
    scale = scale_up_to(largest, EXPONENT)
    scaled = codebook * scale
    high = lax.reduce_precision(scaled, exponent_bits=5, mantissa_bits=10)
    halves = 0.5 * jnp.sum((scaled if passes == 3 else high) ** 2, axis=1)
    parts = [high, high, scaled - high][:passes]
    table = -jnp.concatenate(parts, axis=1).astype(jnp.float16)
    padding = tiles * 8 - k
    table = jnp.pad(table, ((0, padding), (0, steps * 16 - passes * d)))
    # In the order in which the lanes of a warp hold the second factor of a product of tiles.
    table = table.reshape(tiles, 8, steps, 2, 4, 2).transpose(0, 2, 1, 4, 3, 5)
    halves = jnp.pad(halves, (0, padding), constant_values=jnp.inf)
    sizes = jnp.stack([jnp.asarray(part, jnp.int32) for part in (n if count is None else count, tiles, k)])
    constants = {"DIM": d, "PASSES": passes, "STEPS": steps, "ROW_TILES": row_tiles, "CHUNK": chunk, "GROUP": group}
    constants |= {"WARPS": WARPS}
    result = jax.ShapeDtypeStruct((n,), jnp.int32)
    operands = points, codebook, table, halves, scale.reshape(1), sizes
    blocks = -(-n // (WARPS * 16 * row_tiles))
    return cuda.launch("nearest", constants, result, *operands, blocks=blocks, threads=32 * WARPS)


def size_of(points: Float[Array, "n d"], codebook: Float[Array, "k d"]) -> Float[Array, ""]:
    """The largest size of a value, but for points far outside the codebook, which must not cost the others digits."""
    sizes = jnp.abs(points)
    largest = jnp.max(jnp.where(sizes < jnp.inf, sizes, 0), initial=0)
    return jnp.minimum(largest, FAR_OUTSIDE * jnp.max(jnp.abs(codebook), initial=0))


def sum_scales(values: Float[Array, "n e"], axis_name: str | None = None) -> Float[Array, " e"]:
    """What to multiply each column by, a power of two, so that its sums fit into 62 bits."""
    largest, rows = jnp.max(jnp.abs(values), axis=0, initial=0), values.shape[0]
    if axis_name is not None:
        largest, rows = lax.pmax(largest, axis_name), rows * lax.axis_size(axis_name)
    return scale_up_to(largest, 62 - (rows - 1).bit_length())


def sums_by_code(
    values: Float[Array, "n e"],
    codes: Int32[Array, " n"],
    k: int,
    *,
    scales: Float[Array, " e"],
    axis_name: str | None = None,
) -> Float[Array, "k e"]:
    """Adds up the rows of `values` that share a code, as whole numbers: the same bits in whatever order.

    A value keeps its 24 digits down to 2**-17 of its column's largest, for as many as two million rows. With an
    `axis_name` the rows of all devices along that mesh axis are added up.
    """
    n, e = values.shape
    copies = max(1, min(COPIES_MOST, NUMBERS_APART // (k * e)))
    zeros = jnp.zeros((copies, k, e, 2), jnp.uint32)
    operands = values, codes, scales, jnp.array([n], jnp.int32), zeros
    blocks = max(1, min(PROCESSORS * 16, -(-n * e // 256)))
    constants = {"WIDTH": e, "ENTRIES": k, "COPIES": copies}
    result = jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)
    whole = cuda.launch("sums", constants, result, *operands, blocks=blocks, threads=256, overwrites=4)
    low, high = sum_whole(whole[..., 0], whole[..., 1], axis_name)
    negative = high >= jnp.uint32(2**31)
    low, high = jnp.where(negative, ~low, low), jnp.where(negative, ~high, high)
    size = high.astype(jnp.float32) * 2.0**32 + low.astype(jnp.float32)
    return jnp.where(negative, -size, size) / scales


def sum_whole(
    low: UInt32[Array, "copies *shape"], high: UInt32[Array, "copies *shape"], axis_name: str | None = None
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Adds up 64-bit numbers, given as halves, over the first axis and all devices along a mesh axis.

    They are added in pieces of 16 bits, which leaves room to carry for 65,536 of them.
    """
    pieces = [
        jnp.sum(piece, axis=0, dtype=jnp.uint32) for piece in (low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16)
    ]
    digits, carry = [], jnp.uint32(0)
    for total in pieces if axis_name is None else lax.psum(pieces, axis_name):
        digits.append((total + carry) & 0xFFFF)
        carry = (total + carry) >> 16
    return digits[0] | digits[1] << 16, digits[2] | digits[3] << 16


def palettes(
    values: Float[Array, "p n"],
    weights: Float[Array, "p n"] | None,
    edges: Int32[Array, "p edges"],
    k: int,
    *,
    problems: Int[Array, ""] | int,
    count: Int[Array, ""] | int,
) -> Float[Array, "p k"]:
    """The codebook of `k` values with the least weighted squared error, for each row of ascending values.

    The best choice of cuts among the edges by dynamic programming, then Lloyd's iteration until nothing moves, then
    both again over edges around the cuts.

    Args:
      values: `[p, n]`, ascending.
      weights: `[p, n]`; None for 1.
      edges: candidate cuts of each row, ascending from 0 to `count`.
      k: entries.
      problems: only this many leading rows are solved; the others stay undefined.
      count: only this many leading values of a row are real.
    """
    (p, n), grid = values.shape, edges.shape[1] - 1
    threads = min(1024, max(128, -(-grid // 32) * 32))
    shared_nbytes = _grid_nbytes(grid)
    at_once = max(1, min(2048 // threads, cuda.shared_nbytes() // _palette_nbytes(k, grid)))
    blocks = min(p, PROCESSORS * at_once)
    constants = {
        "ENTRIES": k,
        "GRID": grid,
        "WEIGHTED": int(weights is not None),
        "ROUNDS": 1 if grid == n else ROUNDS,
        "ITERATIONS": ITERATIONS,
        "THREADS": threads,
    }
    room = jax.ShapeDtypeStruct((blocks, k, grid + 1), jnp.uint16)
    sizes = jnp.stack([jnp.asarray(size, jnp.int32) for size in (problems, count, n)])
    operands = values, values[:1, :1] if weights is None else weights, edges, sizes
    results = jax.ShapeDtypeStruct((p, k), jnp.float32), room
    launch = {"blocks": blocks, "threads": threads, "shared_nbytes": shared_nbytes}
    return cuda.launch("palette", constants, results, *operands, **launch)[0]
