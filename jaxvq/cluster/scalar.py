"""Optimal codebooks of single values: weighted k-means in one dimension.

In one dimension every cluster is an interval of the sorted values, so a codebook is a choice of `k - 1` cuts and
dynamic programming finds the best ones (Grønlund, Larsen, Mathiasen, Nielsen, Schneider and Song, "Fast Exact
k-Means, k-Medians and Bregman Divergence Clustering in 1D", 2017, arXiv 1701.07204). Here that runs in two steps,
each a few vectorized operations:

1. Over a grid of at most `8 k` candidate cuts, dense where the optimal quantizer's cuts are dense. With few values
   every gap is a candidate and the answer is exact. With more than 1024 entries the grid itself is the start.
2. Around that answer: every cut may move to some forty places on either side, all cuts jointly, until nothing gains.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from jaxvq._numerics import running_sum, safe_divide

_GRID_LEAST = 256
_GRID_EXACT = 512
_GRID_MOST = 2048
_ENTRIES_SEARCHED = 1024
_GRID_PER_ENTRY = 8
_ROUNDS = 4
_ROUNDS_FROM_GRID = 8
_PARTS = 16
_PAIRS = 2**24
_MOVES = 32


@functools.partial(jax.jit, static_argnames="k")
def kmeans1d(
    values: Float[Array, " n"],
    k: int,
    *,
    weights: Float[Array, " n"] | None = None,
    count: Int[Array, ""] | int | None = None,
) -> Float[Array, " k"]:
    """The codebook of `k` values with the least weighted squared error, in ascending order.

    With fewer than `k` distinct values some entries are repeated. The error is that of the exact algorithm to within
    0.1%, and is exact up to 512 values. Beyond 1024 entries the search is local: it may end a sixth above the exact
    error on a Gaussian, and further on heavy tails.

    Args:
      values: the numbers to cluster, `[n]`; clustered in float32.
      k: entries of the codebook.
      weights: the importance of each value, `[n]`, not negative; 0 marks padding. None for 1, which takes half the
        time.
      count: only this many leading values are real; it may be traced.

    Raises:
      ValueError: when there are no values.

    Example:
      >>> kmeans1d(jnp.array([0.0, 1.0, 10.0, 11.0]), 2)
      Array([ 0.5, 10.5], dtype=float32)
    """
    if not values.size:
        raise ValueError("`values` must hold at least one number to cluster, got none; pass some")
    x = values.astype(jnp.float32)
    inside = jnp.arange(x.size) < (x.size if count is None else count)
    w = jnp.where(inside, 1 if weights is None else weights.astype(jnp.float32), 0).astype(jnp.float32)
    x = jnp.where(w > 0, x, jnp.max(jnp.where(w > 0, x, -jnp.inf)))
    # Padding has become the largest value, which is last: weights of 1 are in order already.
    x, w = (ascending(x), w) if weights is None else jax.lax.sort((x, w), num_keys=1)
    x, w = _distinct(x, w)
    return _centroids(x, w, _cuts(x, w, k))


def ascending(values: Float[Array, " n"]) -> Float[Array, " n"]:
    """float32 values sorted by their bits, as integers of the same order; NaN comes first or last, by its sign.

    On a processor that takes a sixth of the time of `jnp.sort`, which compares floats with care for NaN.
    """

    def ordered(bits: Int32[Array, " n"]) -> Int32[Array, " n"]:
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the smaller of two negative floats has the larger bits

    bits = jnp.sort(ordered(jax.lax.bitcast_convert_type(values, jnp.int32)))
    return jax.lax.bitcast_convert_type(ordered(bits), jnp.float32)


def _cuts(x: Float[Array, " n"], w: Float[Array, " n"], k: int) -> Int32[Array, " cuts"]:
    """The `k + 1` cuts of the best clusters of sorted values, 0 and n among them."""
    ranks = jnp.arange(x.size + 1, dtype=jnp.int32)
    grid = grid_size(x.size, k)
    if k >= x.size:
        return jnp.concatenate([ranks, jnp.full(k - x.size, x.size, jnp.int32)])
    if grid == x.size:
        return _best_cuts(x, w, ranks, k)
    if k > _ENTRIES_SEARCHED:
        start, rounds = candidates(x, w, k), _ROUNDS_FROM_GRID
    else:
        start, rounds = _best_cuts(x, w, candidates(x, w, grid), k), _ROUNDS
    return _until_still(functools.partial(_refine, x, w), start, rounds) if k > 1 else start


def nearest1d(values: Float[Array, " n"], codebook: Float[Array, " k"]) -> Int32[Array, " n"]:
    """The index of the closest entry of an ascending codebook; a tie goes to the lower index.

    Example:
      >>> nearest1d(jnp.array([0.2, 0.5, 0.9]), jnp.array([0.0, 1.0]))
      Array([0, 0, 1], dtype=int32)
    """
    codebook = codebook.astype(jnp.float32)
    middles = codebook[:-1] + (codebook[1:] - codebook[:-1]) / 2
    method = "compare_all" if codebook.size <= 32 else "scan_unrolled"
    return jnp.searchsorted(middles, values.astype(jnp.float32), side="left", method=method).astype(jnp.int32)


def grid_size(n: int, k: int) -> int:
    """How many intervals the first step's candidate cuts make of `n` values."""
    if n <= (_GRID_EXACT if k <= _ENTRIES_SEARCHED else _GRID_MOST):
        return n
    return min(n, max(_GRID_PER_ENTRY * k, _GRID_LEAST), _GRID_MOST)


def thin(
    values: Float[Array, " n"], weights: Float[Array, " n"], block: int
) -> tuple[Float[Array, " s"], Float[Array, " s"]]:
    """A weighted sample that clusters like all the values: three for each `block` of neighbours.

    They are the block's two extremes, so that no outlier is lost, and one other value that carries the rest of the
    weight. The excess error of a codebook of `k` entries is about `k` divided by the size of the sample.

    Example:
      >>> thin(jnp.arange(8.0), jnp.ones(8), 4)[1]
      Array([1., 1., 2., 1., 1., 2.], dtype=float32)
    """
    x, w = values.astype(jnp.float32), weights.astype(jnp.float32)
    pad = -x.size % block
    x = jnp.pad(x, (0, pad), mode="edge").reshape(-1, block)
    w = jnp.pad(w, (0, pad)).reshape(-1, block)
    low = jnp.argmin(jnp.where(w > 0, x, jnp.inf), axis=1)[:, None]
    high = jnp.argmax(jnp.where(w > 0, x, -jnp.inf), axis=1)[:, None]
    index = jnp.arange(block, dtype=jnp.int32)
    # The first value from a random place on that is no extreme: a fixed place would follow any period of the weight.
    first = jax.random.randint(jax.random.key(0), low.shape, 0, block, jnp.int32)
    turn = jnp.where((w > 0) & (index != low) & (index != high), (index - first) % block, block)
    inner = jnp.argmin(turn, axis=1)[:, None]
    pick = functools.partial(jnp.take_along_axis, axis=1)
    w_low = pick(w, low)
    w_high = jnp.where(high == low, 0, pick(w, high))
    w_rest = jnp.maximum(w.sum(axis=1, keepdims=True) - w_low - w_high, 0)
    w_rest = jnp.where((inner == low) | (inner == high), 0, w_rest)
    points = jnp.concatenate([pick(x, low), pick(x, high), pick(x, inner)], axis=1)
    return points.reshape(-1), jnp.concatenate([w_low, w_high, w_rest], axis=1).reshape(-1)


def _distinct(x: Float[Array, " n"], w: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Sorted values without repetition, their weights added up, and padding of weight 0 behind them."""
    n = x.size
    starts = jnp.concatenate([jnp.ones(1, bool), x[1:] > x[:-1]])
    rank = running_sum(starts.astype(jnp.float32))[:-1].astype(jnp.int32)
    first = (
        jnp.full(n + 1, n, jnp.int32)
        .at[jnp.where(starts, rank, n + 1)]
        .set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    )
    total = running_sum(w)
    return x[jnp.minimum(first[:-1], n - 1)], total[first[1:]] - total[first[:-1]]


def _best_cuts(
    x: Float[Array, " n"], w: Float[Array, " n"], edges: Int32[Array, " edges"], k: int
) -> Int32[Array, " cuts"]:
    """The best `k + 1` cuts (the first and the last edge among them) out of `edges`."""
    grid = edges.size - 1
    mass, mean, spread = _bins(x, w, edges)
    cost = _interval_costs(mass, mean, spread)
    first = jnp.full(grid + 1, jnp.inf, jnp.float32).at[0].set(0)

    def extend(best: Array, _: None) -> tuple[Array, Array]:
        return jnp.min(best[:, None] + cost, axis=0), best

    _, bests = jax.lax.scan(extend, first, length=k)

    def trace_back(end: Array, best: Array) -> tuple[Array, Array]:
        start = jnp.argmin(best + cost[:, end]).astype(jnp.int32)
        return start, end

    start, ends = jax.lax.scan(trace_back, jnp.int32(grid), bests, reverse=True)
    return edges[jnp.concatenate([start[None], ends])]


def candidates(x: Float[Array, " n"], w: Float[Array, " n"], grid: int) -> Int32[Array, " edges"]:
    """`grid + 1` ascending cuts, as dense as the cuts of a good quantizer.

    The best quantizer's density is the cube root of the data's (Panter and Dite, "Quantization distortion in
    pulse-count modulation with nonuniform spacing of levels", 1951), whose integral over a gap between neighbours
    is about `gap**(2/3) * weight**(1/3)`. Half of the candidates follow that; half are spread evenly over the
    gaps, so that a few distinct values all get their cuts. A gap can hold one cut, so its share is capped.
    """
    gap = x[1:] - x[:-1]
    real = gap > 0
    share = jnp.where(real, jnp.cbrt(gap * gap * (w[1:] + w[:-1])), 0)
    for _ in range(4):
        share = jnp.minimum(share, jnp.sum(share) * 4 / grid)
    share = safe_divide(share, jnp.sum(share)) + safe_divide(real.astype(jnp.float32), jnp.sum(real, dtype=jnp.float32))
    level = running_sum(share)[1:]
    goals = (jnp.arange(grid - 1, dtype=jnp.float32) + 0.5) / (grid - 1) * level[-1]
    inner = jnp.searchsorted(level, goals).astype(jnp.int32) + 1
    return jnp.concatenate([jnp.zeros(1, jnp.int32), inner, jnp.full(1, x.size, jnp.int32)])


def _bins(
    x: Float[Array, " n"], w: Float[Array, " n"], edges: Int32[Array, " edges"]
) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """Weight, mean and squared deviation of the values between neighbouring edges."""
    reference = x[jnp.minimum(edges[:-1], x.size - 1)]
    total = _prefix_moments(x, w, edges, reference)
    mass, first, second = (sums[edges[1:]] - sums[edges[:-1]] for sums in total)
    shift = safe_divide(first, mass)
    return mass, reference + shift, jnp.maximum(second - first * shift, 0)


def _prefix_moments(
    x: Float[Array, " n"], w: Float[Array, " n"], cuts: Int32[Array, " cuts"], reference: Float[Array, " s"]
) -> tuple[Float[Array, " n1"], Float[Array, " n1"], Float[Array, " n1"]]:
    """Running sums of `w`, `w u` and `w u**2`, where `u` is a value less the reference of its interval.

    Differences of these sums are accurate in float32, because `u` is as small as the interval is narrow; sums of
    `w x**2` would cancel.
    """
    step = jnp.zeros(x.size + 1, jnp.float32).at[cuts[1:-1]].add(1)[:-1]
    u = x - reference[running_sum(step)[1:].astype(jnp.int32)]
    return tuple(running_sum(jnp.stack([w, w * u, w * u * u])))  # type: ignore[return-value]


def _interval_costs(
    mass: Float[Array, " b"], mean: Float[Array, " b"], spread: Float[Array, " b"]
) -> Float[Array, "b1 b1"]:
    """`cost[i, j]`: the squared error of one centroid for bins i to j - 1; 0 for none, infinite for i > j.

    Bins are merged one at a time (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983):
    a sum of positive terms, so nothing cancels.
    """
    bins = mass.size
    last = jnp.arange(bins + 1)

    def prepend(state: tuple[Array, Array, Array], one: tuple[Array, Array, Array, Array]):
        total, centre, error = state
        i, m, mu, s = one
        both = total + m
        delta = centre - mu
        part = safe_divide(total, both)
        holds = last > i
        total = jnp.where(holds, both, 0)
        centre = jnp.where(holds, mu + delta * part, 0)
        error = jnp.where(holds, error + s + delta * delta * part * m, 0)
        return (total, centre, error), jnp.where(last >= i, error, jnp.inf)

    zero = jnp.zeros(bins + 1, jnp.float32)
    each = (jnp.arange(bins), mass, mean, spread)
    _, rows = jax.lax.scan(prepend, (zero, zero, zero), each, reverse=True)
    empty = jnp.where(last == bins, 0, jnp.inf)
    return jnp.concatenate([rows, empty[None]])


def _refine(x: Float[Array, " n"], w: Float[Array, " n"], cuts: Int32[Array, " cuts"]) -> Int32[Array, " cuts"]:
    """Moves all cuts jointly, each as far as its neighbours' first places at most, until nothing gains."""
    middles = x[jnp.minimum((cuts[:-1] + cuts[1:]) // 2, x.size - 1)]
    sums = _prefix_moments(x, w, cuts, middles)
    clusters = cuts.size - 1
    # Every pair of options of neighbouring cuts is weighed, so many clusters get fewer options.
    most = max(2, min(_PARTS, math.isqrt(_PAIRS // clusters) // 4))
    reach = max(1, min(most, math.ceil(math.log2(4 * x.size / clusters))))
    near = jnp.array([2**p for p in range(reach)], jnp.int32)

    def move(inner: Array) -> Array:
        options = jnp.clip(_options(cuts, inner, near, most), cuts[:-2, None], cuts[2:, None])
        return _best_options(sums, cuts, middles, options)

    return cuts.at[1:-1].set(_until_still(move, cuts[1:-1], _MOVES))


def _options(
    cuts: Int32[Array, " cuts"], inner: Int32[Array, " inner"], near: Int32[Array, " reach"], parts: int
) -> Int32[Array, "inner options"]:
    """Where each inner cut may go: by powers of two, or by a part of the way to its neighbour; itself in the middle."""
    whole = cuts.at[1:-1].set(inner)
    here, below, above = whole[1:-1, None], whole[:-2, None], whole[2:, None]
    shares = jnp.arange(1, parts + 1, dtype=jnp.int32)
    up = [here + near, here + (above - here) * shares // parts]
    down = [here - near, here - (here - below) * shares // parts]
    return jnp.concatenate([*down, here, *up], axis=1)


def _until_still(
    step: Callable[[Int32[Array, " c"]], Int32[Array, " c"]], cuts: Int32[Array, " c"], most: int
) -> Int32[Array, " c"]:
    """Repeats `step` until the cuts stay where they are, `most` times at most."""

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        now, _, count = state
        better = step(now)
        return better, jnp.any(better != now), count + 1

    start = (cuts, jnp.bool_(True), jnp.int32(0))
    return jax.lax.while_loop(lambda state: state[1] & (state[2] < most), body, start)[0]


def _best_options(
    sums: tuple[Array, Array, Array],
    cuts: Int32[Array, " cuts"],
    references: Float[Array, " k"],
    options: Int32[Array, "inner options"],
) -> Int32[Array, " inner"]:
    """The choice of one option per inner cut with the least squared error, by dynamic programming."""
    # What an option adds to the cluster on its left, and takes from the one on its right, about each's reference.
    to_left = _moved_moments(sums, cuts[1:-1], options, references[:-1], references[1:])
    to_right = _moved_moments(sums, cuts[1:-1], options, references[1:], references[:-1])
    whole = tuple(s[cuts[1:]] - s[cuts[:-1]] for s in sums)
    ends = tuple(jnp.pad(m, ((0, 1), (0, 0))) for m in to_left)
    starts = tuple(jnp.pad(m, ((1, 0), (0, 0))) for m in to_right)
    mass, first, second = (
        h[:, None, None] + e[:, None, :] - s[:, :, None] for h, e, s in zip(whole, ends, starts, strict=True)
    )
    positions = jnp.concatenate(
        [
            jnp.broadcast_to(cuts[:1, None], (1, options.shape[1])),
            options,
            jnp.broadcast_to(cuts[-1:, None], (1, options.shape[1])),
        ]
    )
    forward = positions[1:, None, :] >= positions[:-1, :, None]
    # An interval far from its reference has two huge terms here; it must not gain from their rounding.
    rounding = 8 * jnp.finfo(jnp.float32).eps * second
    error = jnp.maximum(second - safe_divide(first * first, mass), 0) + rounding
    cost = jnp.where(forward, jnp.where(mass > 0, error, 0), jnp.inf)

    def extend(best: Array, step: Array) -> tuple[Array, Array]:
        return jnp.min(best[:, None] + step, axis=0), best

    def trace_back(end: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        best, table = step
        start = jnp.argmin(best + table[:, end]).astype(jnp.int32)
        return start, start

    still = options.shape[1] // 2
    first_best = jnp.full(options.shape[1], jnp.inf, jnp.float32).at[still].set(0)
    _, bests = jax.lax.scan(extend, first_best, cost)
    _, chosen = jax.lax.scan(trace_back, jnp.int32(still), (bests, cost), reverse=True)
    return jnp.take_along_axis(options, chosen[1:, None], axis=1)[:, 0]


def _moved_moments(
    sums: tuple[Array, Array, Array],
    cut: Int32[Array, " inner"],
    options: Int32[Array, "inner options"],
    own: Float[Array, " inner"],
    other: Float[Array, " inner"],
) -> tuple[Array, Array, Array]:
    """Moments, about `own`, of the values between a cut and each option; negative to the left of the cut.

    The running sums are about the reference on the side of the cut where the values lie: `own` on one side, `other`
    on the other.
    """
    mass, first, second = (s[options] - s[cut][:, None] for s in sums)
    left_is_own = (own < other)[:, None]
    on_left = options < cut[:, None]
    shift = jnp.where(on_left == left_is_own, 0, (other - own)[:, None])
    return mass, first + shift * mass, second + shift * (2 * first + shift * mass)


def _centroids(x: Float[Array, " n"], w: Float[Array, " n"], cuts: Int32[Array, " cuts"]) -> Float[Array, " k"]:
    """The mean of each cluster; an empty one repeats its lower neighbour (or the lowest)."""
    mass, mean, _ = _bins(x, w, cuts)
    mean = jax.lax.cummax(jnp.where(mass > 0, mean, -jnp.inf))
    return jnp.maximum(mean, jnp.min(jnp.where(mass > 0, mean, jnp.inf)))
