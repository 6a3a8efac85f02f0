"""Weighted k-means by Lloyd's iteration."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, Shaped

from jaxvq._numerics import as_storage, from_storage, safe_divide
from jaxvq.ops.lookup import one_hot_sums
from jaxvq.ops.nearest import check_points, chunk_length, in_chunks, scores


def kmeans(
    points: Shaped[Array, "..."],
    centroids: Shaped[Array, "..."],
    *,
    iterations: int,
    weights: Shaped[Array, "..."] | None = None,
    count: Int[Array, ""] | int | None = None,
) -> Float[Array, "k d"]:
    """Moves centroids to a local minimum of the weighted squared distance to the points.

    Each iteration gives every point to its nearest centroid and moves every centroid to the mean of its points. A
    centroid without points takes over half of the most populated cluster.

    Args:
      points: `[n, d]`.
      centroids: `[k, d]`, where to start.
      iterations: how many times to assign and move.
      weights: how much each point counts, `[n]`, or each of its coordinates, `[n, d]`; a point of weight 0 is padding.
      count: only this many leading points are real. It may be traced: chunks of mere padding then cost nothing.

    Returns:
      Centroids `[k, d]` in float32.

    Raises:
      ValueError: for shapes that do not fit together.

    Example:
      >>> kmeans(jnp.array([[0.0], [1.0], [8.0], [9.0]]), jnp.array([[0.0], [1.0]]), iterations=5)
      Array([[0.5],
             [8.5]], dtype=float32)

    Source: Lloyd, "Least squares quantization in PCM", 1982.
    """
    check_points(points, centroids, "centroids")
    if weights is not None and weights.shape not in (points.shape, points.shape[:1]):
        raise ValueError(
            f"`weights` must be {points.shape[:1]} or {points.shape} like `points`, got {weights.shape}; "
            "pass one per point or one per coordinate"
        )
    per_point = jnp.ones(points.shape[:1], jnp.float32) if weights is None else weights
    return _lloyd(points, centroids, per_point, iterations, points.shape[0] if count is None else count)


@jax.jit
def _lloyd(points: Array, centroids: Array, weights: Array, iterations: Array, count: Array) -> Float[Array, "k d"]:
    (n, d), k = points.shape, centroids.shape[0]
    by_coordinate = weights.ndim == 2 and d > 1
    length = chunk_length(n, k)
    point_chunks = _column_chunks(as_storage(points), length)
    weight_chunks = _column_chunks(weights.reshape(n, -1), length)
    chunks = -(-count // max(length, 1))
    centre = centroids.astype(jnp.float32).mean(axis=0)

    def move(_: Array, centroids: Float[Array, "k d"]) -> Float[Array, "k d"]:
        def add_chunk(i: Array, moments: Float[Array, "k e"]) -> Float[Array, "k e"]:
            x = from_storage(point_chunks[i], points.dtype).astype(jnp.float32) - centre[:, None]
            inside = i * length + jnp.arange(length) < count
            w = jnp.where(inside, weight_chunks[i].astype(jnp.float32), 0)
            codes = roughly_nearest(x, centroids, w if by_coordinate else None)
            squares = jnp.sum(w * x**2, axis=0, keepdims=True)
            return moments + sums_by_code(jnp.concatenate([w, w * x, squares]).T, codes, k)

        moments = lax.fori_loop(0, chunks, add_chunk, jnp.zeros((k, weight_chunks.shape[1] + d + 1), jnp.float32))
        return update(centroids, moments)

    return lax.fori_loop(0, iterations, move, centroids.astype(jnp.float32) - centre) + centre


def _column_chunks(rows: Shaped[Array, "n e"], length: int) -> Shaped[Array, "chunks e length"]:
    return in_chunks(rows, length).transpose(0, 2, 1)


def roughly_nearest(
    points: Float[Array, "d n"], centroids: Float[Array, "k d"], weights: Float[Array, "d n"] | None
) -> Int32[Array, " n"]:
    """The nearest centroid in one reduction, half of what an exact answer takes on a processor.

    The index takes the place of the lowest `log2(k)` of the 23 bits of a squared distance, so that the least number
    names the nearest centroid. Between distances that agree in all other bits the lowest index wins, which loses at
    most `k / 2**23` of a squared distance. That is good enough to move centroids by.
    """
    k = centroids.shape[0]
    mask = 2 ** (k - 1).bit_length() - 1
    squares = 0.5 * jnp.sum(points**2 if weights is None else weights * points**2, axis=0)
    distance = jnp.maximum(scores(points, centroids, weights) + squares, 1e-30)  # below 1e-38 the index would be lost
    high = lax.bitcast_convert_type(distance, jnp.int32) & ~mask
    packed = lax.bitcast_convert_type(high | lax.broadcasted_iota(jnp.int32, (k, 1), 0), jnp.float32)
    return jnp.minimum(lax.bitcast_convert_type(packed.min(axis=0), jnp.int32) & mask, k - 1)


def update(centroids: Float[Array, "k d"], moments: Float[Array, "k e"]) -> Float[Array, "k d"]:
    """New centroids from each cluster's sums of `weight`, `weight * x` and `weight * |x|**2`."""
    d = centroids.shape[1]
    mass, first, second = moments[:, : -d - 1], moments[:, -d - 1 : -1], moments[:, -1]
    means = jnp.where(mass > 0, safe_divide(first, mass), centroids)
    total = mass.sum(axis=1) * (d // mass.shape[1])
    squares = safe_divide(second, total)
    variance = squares - safe_divide(jnp.sum(mass * means**2, axis=1), total)
    variance = jnp.where(variance > 1e-5 * squares, variance, 0)  # less is rounding
    return split_for_empty(means, variance, total)


def split_for_empty(
    centroids: Float[Array, "k d"], variance: Float[Array, " k"], mass: Float[Array, " k"]
) -> Float[Array, "k d"]:
    """Gives the i-th empty cluster one half of the i-th most populated one.

    The two halves lie half a standard deviation on either side of the old centroid in every coordinate.

    Source: Stock et al., "And the Bit Goes Down: Revisiting the Quantization of Neural Networks", 2020,
    arXiv 1907.05686, who split the most populated cluster too, by a random step.
    """
    k = centroids.shape[0]
    empty = mass <= 0
    most_populated_first = jnp.argsort(-mass)
    rank = jnp.cumsum(empty) - 1
    donor = most_populated_first[rank % jnp.maximum(k - empty.sum(), 1)]
    step = 0.5 * jnp.sqrt(variance[donor])[:, None]
    halves = jnp.where(empty[:, None], centroids[donor] + step, centroids)
    return halves.at[jnp.where(empty, donor, k)].set(centroids[donor] - step, mode="drop")


def sums_by_code(values: Float[Array, "n e"], codes: Int32[Array, " n"], k: int) -> Float[Array, "k e"]:
    """Adds up the rows of `values` that share a code, in the same order on every run."""
    on_cpu = functools.partial(jax.ops.segment_sum, num_segments=k)
    elsewhere = functools.partial(one_hot_sums, k=k)
    return lax.platform_dependent(values, codes, cpu=on_cpu, default=elsewhere)
