"""Product quantization: independent codebooks for independent sets of vectors."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxvq.cluster.init import kmeans_plus_plus
from jaxvq.cluster.kmeans import lloyd
from jaxvq.ops.nearest import chunk_length


@functools.partial(jax.jit, static_argnames=("k", "iterations", "restarts"))
def fit_product(
    key: Array,
    points: Shaped[Array, "p n d"],
    k: int,
    *,
    iterations: int,
    weights: Shaped[Array, "p n"] | Shaped[Array, "p n d"] | None = None,
    count: Int[Array, ""] | int | None = None,
    restarts: int = 1,
    tolerance: float = 0.0,
) -> Float[Array, "p k d"]:
    """Fits a codebook to each of `p` sets of vectors: k-means++, then k-means.

    One set is a codebook shared by a whole weight, `g` sets are one codebook per subspace.

    Args:
      key: random key.
      points: `[p, n, d]`.
      k: vectors per codebook.
      iterations: iterations of k-means.
      weights: how much each point counts, `[p, n]`, or each of its coordinates, `[p, n, d]`; weight 0 is padding.
      count: only this many leading points of each set are real; it may be traced.
      restarts: from how many starts to cluster; the codebook of the least distortion is kept.
      tolerance: as for `kmeans`.

    Returns:
      Codebooks `[p, k, d]` in float32.

    Sources: Jegou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", 2011; Stock et al., "And
    the Bit Goes Down: Revisiting the Quantization of Neural Networks", 2020, arXiv 1907.05686.
    """

    sets, n, _ = points.shape

    def fit(problem: tuple[Array, Array, Array | None]) -> Float[Array, "k d"]:
        key, x, w = problem
        mass = None if w is None else w.reshape(n, -1).mean(axis=1)

        def attempt(key: Array) -> tuple[Float[Array, "k d"], Float[Array, ""]]:
            start = kmeans_plus_plus(key, x, k, weights=mass, count=count)
            return lloyd(x, start, w, iterations, count, tolerance)

        if restarts == 1:
            return attempt(key)[0]
        codebooks, distortions = lax.map(attempt, jax.random.split(key, restarts))
        return codebooks[jnp.argmin(distortions)]

    keys = jax.random.split(key, sets)
    if sets == 1:  # a map would copy the points
        return fit((keys[0], points[0], None if weights is None else weights[0]))[None]
    batch = min(sets, max(1, chunk_length(n * sets, k) // n))  # as many at once as one tile of scores holds
    batch = max(size for size in range(1, batch + 1) if sets % size == 0)
    return lax.map(fit, (keys, points, weights), batch_size=batch if batch > 1 else None)
