"""Residual quantization: each stage quantizes what the earlier ones left."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, Shaped

from jaxvq._numerics import safe_divide
from jaxvq.cluster.init import sample
from jaxvq.cluster.kmeans import sums_by_code
from jaxvq.cluster.product import fit_product
from jaxvq.ops.nearest import chunk_length, first_smallest, in_chunks, nearest, scores

REFINEMENTS = 8
POINTS_PER_ENTRY = 256


@functools.partial(jax.jit, static_argnames=("k", "stages", "iterations", "beam"))
def fit_residual(
    key: Array,
    points: Shaped[Array, "n d"],
    k: int,
    stages: int,
    *,
    iterations: int,
    weights: Shaped[Array, " n"] | Shaped[Array, "n d"] | None = None,
    count: Int[Array, ""] | int | None = None,
    beam: int = 8,
) -> Float[Array, "m k d"]:
    """Fits codebooks whose sum stands for the points, one vector from each.

    Each stage is fitted to what the earlier ones left. Then all of them are refined together, on a sample of the
    points: the codes are found again by beam search, and each codebook is set to the means of what the others leave.
    On a unit Gaussian with d = 8 and two stages of 256 this lowers the squared error per value from .102 (greedy)
    to .090 (beam 8).

    Args:
      key: random key.
      points: `[n, d]`.
      k: vectors per codebook.
      stages: `m`, the number of codebooks.
      iterations: iterations of k-means per stage.
      weights: how much each point counts, `[n]`, or each of its coordinates, `[n, d]`; weight 0 is padding.
      count: only this many leading points are real; it may be traced.
      beam: how many candidates the beam search keeps; 1 is greedy, and then nothing is refined: joint means suit
        codes that are searched jointly.

    Returns:
      Codebooks `[m, k, d]` in float32; `encode_residual` gives the codes.

    Sources: Chen, Guan and Wang, "Approximate Nearest Neighbor Search by Residual Vector Quantization", 2010; Babenko
    and Lempitsky, "Additive Quantization for Extreme Vector Compression", 2014.
    """
    n = points.shape[0]
    points = points.astype(jnp.float32)
    sample_key, key = jax.random.split(key)
    sets = None if weights is None else weights[None]
    importance = weights if weights is not None and weights.ndim == 2 else None

    def fit_stage(left: Array, key: Array) -> tuple[Array, Array]:
        codebook = fit_product(key, left[None], k, iterations=iterations, weights=sets, count=count)[0]
        return left - codebook[nearest(left, codebook, weights=importance)], codebook

    _, codebooks = lax.scan(fit_stage, points, jax.random.split(key, stages))
    mass = jnp.ones((n, 1), jnp.float32) if weights is None else weights.reshape(n, -1).astype(jnp.float32)
    mass = jnp.where(jnp.arange(n)[:, None] < (n if count is None else count), mass, 0)
    if n > POINTS_PER_ENTRY * k:
        real = n if weights is None and count is None else mass.max(axis=1) > 0
        rows = sample(sample_key, real, POINTS_PER_ENTRY * k)
        points, mass = points[rows], mass[rows]
        importance = None if importance is None else importance[rows]

    def refine(_: Array, codebooks: Float[Array, "m k d"]) -> Float[Array, "m k d"]:
        codes = encode_residual(points, codebooks, weights=importance, beam=beam)
        return joint_update(points, mass, codebooks, codes)

    return lax.fori_loop(0, REFINEMENTS if stages > 1 and beam > 1 else 0, refine, codebooks)


def joint_update(
    points: Float[Array, "n d"],
    mass: Float[Array, "n #d"],
    codebooks: Float[Array, "m k d"],
    codes: Int32[Array, "n m"],
) -> Float[Array, "m k d"]:
    """Sets each codebook in turn to the weighted means of what the other codebooks leave of the points."""
    k = codebooks.shape[1]
    parts = jax.vmap(lambda table, column: table[column])(codebooks, codes.T)

    def update_stage(left: Array, stage: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        codebook, part, column = stage
        target = left + part
        sums = sums_by_code(jnp.concatenate([mass * target, mass], axis=1), column, k)
        total = sums[:, points.shape[1] :]
        means = jnp.where(total > 0, safe_divide(sums[:, : points.shape[1]], total), codebook)
        return target - means[column], means

    _, updated = lax.scan(update_stage, points - parts.sum(axis=0), (codebooks, parts, codes.T))
    return updated


@functools.partial(jax.jit, static_argnames="beam")
def encode_residual(
    points: Shaped[Array, "n d"],
    codebooks: Shaped[Array, "m k d"],
    *,
    weights: Shaped[Array, "n d"] | None = None,
    beam: int = 8,
) -> Int32[Array, "n m"]:
    """Codes whose vectors add up to (nearly) the nearest sum to each point, by beam search.

    Args:
      points: `[n, d]`.
      codebooks: `[m, k, d]`.
      weights: importance of each coordinate of each point, `[n, d]`.
      beam: how many partial sums are kept from one stage to the next; 1 is greedy.

    Returns:
      Codes `[n, m]`.

    Example:
      >>> codebooks = jnp.array([[[0.0], [10.0]], [[0.0], [1.0]]])
      >>> encode_residual(jnp.array([[0.9], [10.1]]), codebooks)
      Array([[0, 1],
             [1, 0]], dtype=int32)
    """
    n, (m, k, _) = points.shape[0], codebooks.shape
    codebooks = codebooks.astype(jnp.float32)

    def encode(chunk: tuple[Array, Array | None]) -> Int32[Array, "chunk m"]:
        x = chunk[0].astype(jnp.float32)
        w = None if chunk[1] is None else chunk[1].astype(jnp.float32)
        return beam_search(x, codebooks, w, beam)

    length = chunk_length(n, beam * k)
    chunks = in_chunks(points, length), None if weights is None else in_chunks(weights, length)
    return lax.map(encode, chunks).reshape(-1, m)[:n]


def beam_search(
    points: Float[Array, "n d"], codebooks: Float[Array, "m k d"], weights: Float[Array, "n d"] | None, beam: int
) -> Int32[Array, "n m"]:
    """`encode_residual` for few enough points; codes `[n, m]`."""
    (n, d), (m, k, _) = points.shape, codebooks.shape
    everyone = jnp.arange(n)

    def extend(
        state: tuple[Array, Array, Array], stage: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        left, codes, live = state  # [beam, n, d], [beam, n, m], [beam, n]
        i, codebook = stage
        centre = codebook.mean(axis=0)

        def errors(left: Float[Array, "n d"], live: Bool[Array, " n"]) -> Float[Array, "k n"]:
            x = left - centre
            own = 0.5 * jnp.sum(x**2 if weights is None else weights * x**2, axis=1)
            return jnp.where(
                live, own + scores(x.T, codebook - centre, None if weights is None else weights.T), jnp.inf
            )

        best, error = smallest(jax.vmap(errors)(left, live).reshape(beam * k, n), beam)
        parent, code = best // k, best % k
        left = left[parent, everyone] - codebook[code]
        codes = codes[parent, everyone].at[:, :, i].set(code)
        return (left, codes, error < jnp.inf), None

    left = jnp.broadcast_to(points, (beam, n, d))
    live = jnp.broadcast_to(jnp.arange(beam)[:, None] == 0, (beam, n))
    start = left, jnp.zeros((beam, n, m), jnp.int32), live
    (_, codes, _), _ = lax.scan(extend, start, (jnp.arange(m), codebooks))
    return codes[0]


def smallest(errors: Float[Array, "e n"], count: int) -> tuple[Int32[Array, "count n"], Float[Array, "count n"]]:
    """The row indices of the `count` smallest entries of each column, the smallest first, and those entries."""

    def take(errors: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        index = first_smallest(errors)
        taken = jnp.arange(errors.shape[0])[:, None] == index
        return jnp.where(taken, jnp.inf, errors), (index, errors.min(axis=0))

    return lax.scan(take, errors, length=count)[1]
