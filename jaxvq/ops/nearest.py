"""The nearest vector of a codebook."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int32, Shaped

from jaxvq._numerics import matmul, safe_sqrt
from jaxvq.ops import clustering

Numbers = Shaped[ArrayLike, "..."] | Sequence[Any]


def nearest(
    points: Numbers,
    codebook: Numbers,
    *,
    weights: Numbers | None = None,
) -> Int32[Array, " n"]:
    """The index of the codebook vector nearest to each point.

    The distance is Euclidean; between equally near vectors the lowest index wins. Everything is computed in
    float32, whatever the dtype of the arguments, a chunk of points at a time. Single values (d = 1, no weights) are
    subtracted. Longer vectors' squared distances are expanded, `|c|**2 - 2 x.c`, so vectors closer to each other than
    about a thousandth of the codebook's spread may be confused. NaN is near to nothing: a point with NaN gets code 0,
    and NaN in the codebook gives code 0 to all points.

    Args:
      points: `[n, d]`; n may be 0.
      codebook: `[k, d]`.
      weights: importance of each coordinate of each point, `[n, d]`; the squared distance is then
        `sum_j weights[i, j] * (points[i, j] - codebook[c, j])**2`.

    Returns:
      Codes `[n]`, each from 0 to k - 1.

    Raises:
      TypeError: for complex or non-numeric arguments.
      ValueError: for shapes that do not fit together.

    Example:
      >>> nearest(jnp.array([[0.1], [0.9]]), jnp.array([[0.0], [1.0]]))
      Array([0, 1], dtype=int32)
    """
    x, table = real_array("points", points), real_array("codebook", codebook)
    w = None if weights is None else real_array("weights", weights)
    check_points(x, table, "codebook")
    if w is not None and w.shape != x.shape:
        raise ValueError(f"`weights` must have the shape of `points` {x.shape}, got {w.shape}; pass one per coordinate")
    return _nearest(x, table, w)


def vq(observations: Numbers, codebook: Numbers) -> tuple[Int32[Array, " n"], Float[Array, " n"]]:
    """Assigns a code to each observation: the classic call.

    Args:
      observations: `[n, d]`, or `[n]` for single values.
      codebook: `[k, d]`, or `[k]` for single values.

    Returns:
      `(codes, diff)`: the index of the nearest codebook vector, the lowest one on a tie, and the Euclidean distance
      to it, both `[n]`.

    Raises:
      TypeError: for complex or non-numeric arguments.
      ValueError: for shapes that do not fit together.

    Example:
      >>> codes, diff = vq(jnp.array([[1.0, 1.0], [4.0, 5.0]]), jnp.array([[1.0, 1.0], [4.0, 2.0]]))
      >>> codes, diff
      (Array([0, 1], dtype=int32), Array([0., 3.], dtype=float32))
    """
    x, table = real_array("observations", observations), real_array("codebook", codebook)
    if x.ndim == table.ndim == 1:
        x, table = x[:, None], table[:, None]
    check_points(x, table, "codebook", "observations")
    codes = nearest(x, table)
    difference = x.astype(jnp.float32) - table.astype(jnp.float32)[codes]
    return codes, safe_sqrt(jnp.sum(difference**2, axis=1))


@jax.jit
def _nearest(points: Array, codebook: Array, weights: Array | None) -> Int32[Array, " n"]:
    points, codebook, weights = lax.stop_gradient((points, codebook, weights))  # codes have none
    n, d = points.shape
    if n == 0:
        return jnp.zeros(0, jnp.int32)
    if weights is None and d > 1 and clustering.supports_nearest(d, exact=True):
        return lax.platform_dependent(points, codebook, weights, cuda=_by_kernel, default=_by_chunks)
    return _by_chunks(points, codebook, weights)


def _by_kernel(points: Array, codebook: Array, weights: None) -> Int32[Array, " n"]:
    codebook = codebook.astype(jnp.float32)
    centre = codebook.mean(axis=0)
    x, table = points.astype(jnp.float32) - centre, codebook - centre
    return clustering.nearest(x, table, largest=clustering.size_of(x, table), exact=True)


def _by_chunks(points: Array, codebook: Array, weights: Array | None) -> Int32[Array, " n"]:
    n = points.shape[0]
    codebook = codebook.astype(jnp.float32)
    centre = codebook.mean(axis=0)

    def nearest_of_chunk(chunk: tuple[Array, Array | None]) -> Int32[Array, " chunk"]:
        x = chunk[0].astype(jnp.float32)
        if chunk[1] is None and codebook.shape[1] == 1:
            return first_smallest(jnp.abs(codebook - x.T))
        return assign(x - centre, codebook - centre, chunk[1])

    length = chunk_length(n, codebook.shape[0])
    chunks = in_chunks(points, length), None if weights is None else in_chunks(weights, length)
    return lax.map(nearest_of_chunk, chunks).reshape(-1)[:n]


def assign(
    points: Float[Array, "n d"], codebook: Float[Array, "k d"], weights: Float[Array, "n d"] | None
) -> Int32[Array, " n"]:
    """`nearest` for float32 arguments that are centred and few enough for an `[k, n]` array of scores."""
    return first_smallest(scores(points.T, codebook, None if weights is None else weights.T))


def scores(
    points: Float[Array, "d n"], codebook: Float[Array, "k d"], weights: Float[Array, "d n"] | None
) -> Float[Array, "k n"]:
    """The part of half the squared distance that depends on the codebook vector: `|c|**2 / 2 - x.c`.

    Both terms come out of one matrix product. Far from the origin they cancel and their rounding decides, so the
    arguments must be centred. Points are columns, because the product wants them so.
    """
    if weights is None:
        table = jnp.concatenate([0.5 * jnp.sum(codebook**2, axis=1, keepdims=True), -codebook], axis=1)
        features = jnp.concatenate([jnp.ones_like(points[:1]), points])
    else:
        table = jnp.concatenate([0.5 * codebook**2, -codebook], axis=1)
        features = jnp.concatenate([weights, weights * points])
    return matmul(table, features)


def first_smallest(scores: Float[Array, "k n"]) -> Int32[Array, " n"]:
    """The argmin along the first axis, the lowest index on a tie; 0 for a column with NaN.

    Two reductions that vectorize, four to eight times as fast on a processor as `jnp.argmin`. The indices are
    float32 (exact below 2**24) because the reduction is then twice as fast as over int32.
    """
    k = scores.shape[0]
    index = lax.broadcasted_iota(jnp.float32, (k, 1), 0)
    first = jnp.where(scores == scores.min(axis=0), index, k).min(axis=0)
    return jnp.where(first < k, first, 0).astype(jnp.int32)  # NaN equals nothing


def chunk_length(n: int, k: int) -> int:
    """How many of `n` points to score against `k` vectors at once.

    A tile of 2**19 scores stays in a processor's cache; an accelerator wants larger ones.
    The chunks are of equal length, so that little is padded.
    """
    tile = 2**19 if jax.default_backend() == "cpu" else 2**26
    chunks = -(-n // max(tile // k, 256))
    return -(-n // max(chunks, 1))


def in_chunks(rows: Shaped[Array, "n e"], length: int) -> Shaped[Array, "chunks length e"]:
    """Cuts rows into chunks, padding the last one with zeros."""
    chunks = -(-rows.shape[0] // max(length, 1))
    padded = jnp.pad(rows, ((0, chunks * length - rows.shape[0]), (0, 0)))
    return padded.reshape(chunks, length, rows.shape[1])


def real_array(name: str, value: Any) -> Shaped[Array, "..."]:
    """`value` as an array; raises TypeError unless it holds real numbers."""
    try:
        value = value if hasattr(value, "__jax_array__") or isinstance(value, jax.Array) else np.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must hold real numbers, got {type(value).__name__}; pass one array") from None
    dtype = value.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"`{name}` must hold real numbers, got dtype {dtype}; convert it to float32")
    return jnp.asarray(value)


def check_points(points: Array, codebook: Array, codebook_name: str, points_name: str = "points") -> None:
    """Raises ValueError unless the arguments are `[n, d]` and `[k, d]` with d and k at least 1."""
    if points.ndim != 2 or codebook.ndim != 2 or points.shape[1] != codebook.shape[1] or not codebook.size:
        raise ValueError(
            f"`{points_name}` must be [n, d] and `{codebook_name}` [k, d] with the same d of at least 1 and "
            f"k of at least 1, got {points.shape} and {codebook.shape}; reshape them"
        )
