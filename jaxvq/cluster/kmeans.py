"""Weighted k-means by Lloyd's iteration."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, Shaped

from jaxvq._numerics import as_storage, from_storage, running_sum, safe_divide
from jaxvq.ops import clustering
from jaxvq.ops.lookup import one_hot_sums
from jaxvq.ops.nearest import check_points, chunk_length, in_chunks, scores

FEATURES_UNROLLED = 32
CENTROIDS_UNROLLED = 8
POINTS_UNROLLED = 2**13
FAR = 1e38

Moments = Callable[[Float[Array, "k d"]], Float[Array, "k e"]]
State = tuple[Int32[Array, ""], Float[Array, "k d"], Float[Array, ""], Float[Array, ""]]


def kmeans(
    points: Shaped[Array, "..."],
    centroids: Shaped[Array, "..."],
    *,
    iterations: int,
    weights: Shaped[Array, "..."] | None = None,
    count: Int[Array, ""] | int | None = None,
    tolerance: float = 0.0,
    axis_name: str | None = None,
) -> Float[Array, "k d"]:
    """Moves centroids to a local minimum of the weighted squared distance to the points.

    Each iteration gives every point to its nearest centroid and moves every centroid to the mean of its points. A
    centroid without points takes over half of the most populated cluster.

    On NVIDIA's chips, with `jaxvq[cuda]` and one weight per point, two kernels do an iteration; sums are of whole
    numbers, so that the same points give the same bits, on one device or on several. There vectors of more than 16
    values are assigned as rounded to 11 bits, and their means are exact.

    Args:
      points: `[n, d]`.
      centroids: `[k, d]`, where to start.
      iterations: how many times to assign and move, at most.
      weights: how much each point counts, `[n]`, or each of its coordinates, `[n, d]`; a point of weight 0 is padding.
      count: only this many leading points are real. It may be traced: chunks of mere padding then cost nothing.
      tolerance: stop when an iteration lowers the distortion by less than this part of it; 0 for all iterations.
      axis_name: inside `jax.shard_map`, the mesh axis that the points are spread over; every device then returns
        the same centroids.

    Returns:
      Centroids `[k, d]` in float32.

    Raises:
      ValueError: for shapes that do not fit together, or no points.

    Example:
      >>> kmeans(jnp.array([[0.0], [1.0], [8.0], [9.0]]), jnp.array([[0.0], [1.0]]), iterations=5)
      Array([[0.5],
             [8.5]], dtype=float32)

    Source: Lloyd, "Least squares quantization in PCM", 1982.
    """
    check_points(points, centroids, "centroids")
    if not points.shape[0]:
        raise ValueError(f"`points` must hold at least one point to cluster, got {points.shape}; pass some")
    if weights is not None and weights.shape not in (points.shape, points.shape[:1]):
        raise ValueError(
            f"`weights` must be {points.shape[:1]} or {points.shape} like `points`, got {weights.shape}; "
            "pass one per point or one per coordinate"
        )
    return lloyd(points, centroids, weights, iterations, count, tolerance, axis_name)[0]


@functools.partial(jax.jit, static_argnames="axis_name")
def lloyd(
    points: Array,
    centroids: Array,
    weights: Array | None,
    iterations: Array,
    count: Array | None,
    tolerance: Array,
    axis_name: str | None = None,
) -> tuple[Float[Array, "k d"], Float[Array, ""]]:
    """`kmeans`, and the sum of the weighted squared distances in its last iteration."""
    n, d = points.shape
    weights = jnp.ones(n, jnp.float32) if weights is None else weights
    count = jnp.asarray(n) if count is None else count
    arguments = points, centroids, weights, iterations, count, tolerance
    by_chunks = functools.partial(iterate, moments_by=moments_by_chunks, axis_name=axis_name)
    if (weights.ndim == 1 or d == 1) and clustering.supports_nearest(d, exact=False):
        by_kernels = functools.partial(iterate, moments_by=moments_by_kernels, axis_name=axis_name)
        return lax.platform_dependent(*arguments, cuda=by_kernels, default=by_chunks)
    return by_chunks(*arguments)


def iterate(
    points: Array,
    centroids: Array,
    weights: Array,
    iterations: Array,
    count: Array,
    tolerance: Array,
    moments_by: Callable[..., Moments],
    axis_name: str | None,
) -> tuple[Float[Array, "k d"], Float[Array, ""]]:
    """Assigns and moves until the distortion falls no more, or `iterations` times; all about the centroids' mean."""
    centre = centroids.astype(jnp.float32).mean(axis=0)
    start = centroids.astype(jnp.float32) - centre
    moments = moments_by(points, weights, count, centre, start, axis_name)

    def goes_on(state: State) -> Array:
        done, _, before, now = state
        return (done < iterations) & ~((tolerance > 0) & (before - now < tolerance * before))

    def step(state: State) -> State:
        done, centroids, _, before = state
        moved, now = update(centroids, moments(centroids))
        return done + 1, moved, before, now

    infinite = jnp.float32(jnp.inf)
    _, moved, _, distortion = lax.while_loop(goes_on, step, (jnp.int32(0), start, infinite, infinite))
    return moved + centre, distortion


def moments_by_chunks(
    points: Array, weights: Array, count: Array, centre: Array, start: Array, axis_name: str | None
) -> Moments:
    """What `update` needs of the points near each centroid, by programs of XLA, a chunk of points at a time."""
    (n, d), k = points.shape, start.shape[0]
    by_coordinate = weights.ndim == 2 and d > 1
    length = _chunk_length(n, k, 2 * d if by_coordinate else d)
    point_chunks = _column_chunks(as_storage(points), length)
    weight_chunks = _column_chunks(weights.reshape(n, -1), length)
    chunks = -(-count // max(length, 1))

    def moments(centroids: Float[Array, "k d"]) -> Float[Array, "k e"]:
        def add_chunk(i: Array, sums: Float[Array, "k e"]) -> Float[Array, "k e"]:
            x = from_storage(point_chunks[i], points.dtype).astype(jnp.float32) - centre[:, None]
            inside = i * length + jnp.arange(length) < count
            w = jnp.where(inside, weight_chunks[i].astype(jnp.float32), 0)
            codes = roughly_nearest(x, centroids, w if by_coordinate else None)
            squares = jnp.sum(w * x**2, axis=0, keepdims=True)
            return sums + sums_by_code(jnp.concatenate([w, w * x, squares]).T, codes, k)

        none = jnp.zeros((k, weight_chunks.shape[1] + d + 1), jnp.float32)
        sums = lax.fori_loop(0, chunks, add_chunk, none)
        return sums if axis_name is None else lax.psum(sums, axis_name)

    return moments


def moments_by_kernels(
    points: Array, weights: Array, count: Array, centre: Array, start: Array, axis_name: str | None
) -> Moments:
    """The same by the kernels for NVIDIA's chips."""
    n, k = points.shape[0], start.shape[0]
    inside = jnp.arange(n)[:, None] < count
    x = jnp.where(inside, points.astype(jnp.float32) - centre, 0)
    w = jnp.where(inside, weights.reshape(n, 1).astype(jnp.float32), 0)
    values = jnp.concatenate([w, w * x, w * jnp.sum(x**2, axis=1, keepdims=True)], axis=1)
    scales = clustering.sum_scales(values, axis_name)
    largest = clustering.size_of(x, start)
    largest = largest if axis_name is None else lax.pmax(largest, axis_name)

    def moments(centroids: Float[Array, "k d"]) -> Float[Array, "k e"]:
        codes = clustering.nearest(x, centroids, largest=largest, exact=False, count=count)
        return clustering.sums_by_code(values, codes, k, scales=scales, axis_name=axis_name)

    return moments


def _column_chunks(rows: Shaped[Array, "n e"], length: int) -> Shaped[Array, "chunks e length"]:
    return in_chunks(rows, length).transpose(0, 2, 1)


def _chunk_length(n: int, k: int, features: int) -> int:
    """How many points to assign at once: where the scores are never written, the points alone must stay in a cache."""
    if jax.default_backend() != "cpu" or features > FEATURES_UNROLLED:
        return chunk_length(n, k)
    chunks = -(-n // POINTS_UNROLLED)
    return -(-n // max(chunks, 1))


def roughly_nearest(
    points: Float[Array, "d n"], centroids: Float[Array, "k d"], weights: Float[Array, "d n"] | None
) -> Int32[Array, " n"]:
    """The nearest centroid in one reduction, half of what an exact answer takes on a processor.

    The index takes the place of the lowest `log2(k)` of the 23 bits of a squared distance, so that the least number
    names the nearest centroid. Between distances that agree in all other bits the lowest index wins, which loses at
    most `k / 2**23` of a squared distance. That is good enough to move centroids by.
    """
    k, d = centroids.shape
    squares = 0.5 * jnp.sum(points**2 if weights is None else weights * points**2, axis=0)
    if (d if weights is None else 2 * d) > FEATURES_UNROLLED:
        packed = _least_packed(points, centroids, weights, squares)
    else:
        packed = lax.platform_dependent(
            points, centroids, weights, squares, cpu=_least_packed_in_one_loop, default=_least_packed
        )
    return jnp.minimum(packed & _index_mask(k), k - 1)


def _index_mask(k: int) -> int:
    return 2 ** (k - 1).bit_length() - 1


def _packed(distance: Float[Array, "*shape"], index: Int32[Array, "..."] | int, k: int) -> Int32[Array, "*shape"]:
    """Numbers that are ordered like the distances (rounding may leave some just below 0) and hold the index."""
    return (lax.bitcast_convert_type(distance, jnp.int32) & ~_index_mask(k)) | index


def _least_packed(
    points: Float[Array, "d n"],
    centroids: Float[Array, "k d"],
    weights: Float[Array, "d n"] | None,
    squares: Float[Array, " n"],
) -> Int32[Array, " n"]:
    k = centroids.shape[0]
    distance = scores(points, centroids, weights) + squares
    return _packed(distance, lax.broadcasted_iota(jnp.int32, (k, 1), 0), k).min(axis=0)


def _least_packed_in_one_loop(
    points: Float[Array, "d n"],
    centroids: Float[Array, "k d"],
    weights: Float[Array, "d n"] | None,
    squares: Float[Array, " n"],
) -> Int32[Array, " n"]:
    """`_least_packed` written out for a few centroids at a time, which compiles into one loop over the points.

    A matrix product would write the scores to memory and read them back, which takes two thirds of the time.
    """
    k, padding = centroids.shape[0], -centroids.shape[0] % CENTROIDS_UNROLLED
    if weights is None:
        features, table, start = points, -centroids, 0.5 * jnp.sum(centroids**2, axis=1)
    else:
        features = jnp.concatenate([weights, weights * points])
        table, start = jnp.concatenate([0.5 * centroids**2, -centroids], axis=1), jnp.zeros(k, jnp.float32)
    table = jnp.pad(table, ((0, padding), (0, 0)))
    start = jnp.pad(start, (0, padding), constant_values=FAR)

    def some(block: Array, least: Int32[Array, " n"]) -> Int32[Array, " n"]:
        first = block.astype(jnp.int32) * CENTROIDS_UNROLLED
        rows = lax.dynamic_slice_in_dim(table, first, CENTROIDS_UNROLLED)
        starts = lax.dynamic_slice_in_dim(start, first, CENTROIDS_UNROLLED)
        for i in range(CENTROIDS_UNROLLED):
            distance = squares + starts[i]
            for j in range(features.shape[0]):
                distance = distance + features[j] * rows[i, j]
            least = jnp.minimum(least, _packed(distance, first + i, k))
        return least

    none = jnp.full(points.shape[1], jnp.iinfo(jnp.int32).max, jnp.int32)
    return lax.fori_loop(0, table.shape[0] // CENTROIDS_UNROLLED, some, none)


def update(
    centroids: Float[Array, "k d"], moments: Float[Array, "k e"]
) -> tuple[Float[Array, "k d"], Float[Array, ""]]:
    """New centroids from each cluster's sums of `weight`, `weight * x` and `weight * |x|**2`, and the distortion.

    The distortion is the sum of the weighted squared distances to the means of the clusters.
    """
    d = centroids.shape[1]
    mass, first, second = moments[:, : -d - 1], moments[:, -d - 1 : -1], moments[:, -1]
    means = jnp.where(mass > 0, safe_divide(first, mass), centroids)
    total = mass.sum(axis=1) * (d // mass.shape[1])
    squares = safe_divide(second, total)
    variance = squares - safe_divide(jnp.sum(mass * means**2, axis=1), total)
    distortion = jnp.sum(total * jnp.maximum(variance, 0))
    variance = jnp.where(variance > 1e-5 * squares, variance, 0)  # less is rounding
    return split_for_empty(means, variance, total), distortion


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
    rank = running_sum(empty.astype(jnp.float32))[1:].astype(jnp.int32) - 1
    donor = most_populated_first[rank % jnp.maximum(k - empty.sum(), 1)]
    step = 0.5 * jnp.sqrt(variance[donor])[:, None]
    halves = jnp.where(empty[:, None], centroids[donor] + step, centroids)
    return halves.at[jnp.where(empty, donor, k)].set(centroids[donor] - step, mode="drop")


def sums_by_code(values: Float[Array, "n e"], codes: Int32[Array, " n"], k: int) -> Float[Array, "k e"]:
    """Adds up the rows of `values` that share a code, in the same order on every run."""
    on_cpu = functools.partial(jax.ops.segment_sum, num_segments=k)
    elsewhere = functools.partial(one_hot_sums, k=k)
    return lax.platform_dependent(values, codes, cpu=on_cpu, default=elsewhere)
