"""Optimal codebooks of single values, for many sets of values at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxvq.cluster.buckets import map_problems
from jaxvq.cluster.scalar import candidates, grid_size, kmeans1d
from jaxvq.ops import clustering

COSTS_AT_ONCE = 2**21
EDGES_PER_ENTRY = 16  # with 8 the error of a hundred entries is up to a three-hundredth above the least
EDGES_LEAST = 256
EDGES_MOST = 4096


@functools.partial(jax.jit, static_argnames="k")
def fit_palettes(
    values: Shaped[Array, "p n"],
    k: int,
    *,
    weights: Float[Array, "p n"] | None = None,
    problems: Int[Array, ""] | int | None = None,
    count: Int[Array, ""] | int | None = None,
) -> Float[Array, "p k"]:
    """The codebook of `k` values with the least weighted squared error, for each row; see `kmeans1d`.

    On NVIDIA's chips, with `jaxvq[cuda]`, a kernel does the dynamic programming after XLA has sorted the values.

    Args:
      values: `[p, n]`, in any order.
      k: entries of each codebook.
      weights: the importance of each value, `[p, n]`, 0 for padding; None for 1, which sorts twice as fast or more.
      problems: only this many leading rows are real; it may be traced. The other rows of the result mean nothing.
      count: only this many leading values of each row are real; it may be traced.

    Returns:
      Codebooks `[p, k]` in float32, ascending.

    Example:
      >>> fit_palettes(jnp.array([[0.0, 10.0, 1.0, 11.0]]), 2)
      Array([[ 0.5, 10.5]], dtype=float32)
    """
    rows, n = values.shape
    real_rows, real_values = (
        jnp.asarray(most if given is None else given, jnp.int32) for given, most in ((problems, rows), (count, n))
    )
    arguments = values, weights, real_rows, real_values
    some_at_a_time = functools.partial(_some_at_a_time, k=k)
    if clustering.supports_palettes(k, min(_edges(k), n)):
        by_kernel = functools.partial(_by_kernel, k=k)
        return jax.lax.platform_dependent(*arguments, cuda=by_kernel, default=some_at_a_time)
    return some_at_a_time(*arguments)


def _some_at_a_time(
    values: Shaped[Array, "p n"],
    weights: Float[Array, "p n"] | None,
    problems: Int[Array, ""],
    count: Int[Array, ""],
    k: int,
) -> Float[Array, "p k"]:
    """As many rows at once as there is room for their tables of costs."""
    n = values.shape[1]
    at_once = max(1, COSTS_AT_ONCE // grid_size(n, k) ** 2)
    if weights is None:
        return map_problems(lambda x: kmeans1d(x, k, count=count), problems, at_once, values)
    return map_problems(lambda x, w: kmeans1d(x, k, weights=w, count=count), problems, at_once, values, weights)


def _edges(k: int) -> int:
    """How many intervals the candidate cuts make."""
    return min(max(EDGES_PER_ENTRY * k, EDGES_LEAST), EDGES_MOST)


def _by_kernel(
    values: Shaped[Array, "p n"],
    weights: Float[Array, "p n"] | None,
    problems: Int[Array, ""],
    count: Int[Array, ""],
    k: int,
) -> Float[Array, "p k"]:
    n = values.shape[1]
    inside = jnp.broadcast_to(jnp.arange(n) < count, values.shape)
    mass = inside.astype(jnp.float32) if weights is None else jnp.where(inside, weights.astype(jnp.float32), 0)
    x = jnp.where(mass > 0, values.astype(jnp.float32), jnp.inf)
    if weights is None:
        x, w = jnp.sort(x, axis=1), None
    else:
        x, w = jax.lax.sort((x, mass), num_keys=1)
        mass = w
    x = jnp.minimum(x, jnp.max(jnp.where(mass > 0, x, -jnp.inf), axis=1, keepdims=True))  # padding follows the last
    grid = _edges(k)
    if grid >= n:
        edges = jnp.broadcast_to(jnp.arange(n + 1, dtype=jnp.int32), (values.shape[0], n + 1))
    else:
        edges = jax.vmap(lambda x, w: candidates(x, w, grid))(x, mass)
    return clustering.palettes(x, w, jnp.minimum(edges, count), k, problems=problems, count=count)
