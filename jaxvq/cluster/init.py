"""Where k-means starts."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxvq._numerics import as_storage, from_storage, running_sum
from jaxvq.ops.nearest import in_chunks

SAMPLE = 8192
ROUNDS = 1024
ROW = 128


def kmeans_plus_plus(
    key: Array,
    points: Shaped[Array, "n d"],
    k: int,
    *,
    weights: Shaped[Array, " n"] | None = None,
    count: Int[Array, ""] | int | None = None,
) -> Float[Array, "k d"]:
    """Draws `k` of the points, each with a probability proportional to its squared distance to those drawn before.

    It looks at a random sample of `max(8192, 4 * k)` points. Beyond k = 1024 it draws several points between two
    updates of the distances. With fewer distinct points than `k`, some repeat.

    Args:
      key: random key.
      points: `[n, d]`.
      k: how many to draw.
      weights: how much each point counts, `[n]`; a point of weight 0 is never drawn.
      count: only this many leading points are real; it may be traced.

    Returns:
      Points `[k, d]` in float32.

    Raises:
      ValueError: when there are no points.

    Example:
      >>> kmeans_plus_plus(jax.random.key(0), jnp.array([[0.0], [0.0], [9.0]]), 2).sort(axis=0)
      Array([[0.],
             [9.]], dtype=float32)

    Source: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007.
    """
    if not points.shape[0]:
        raise ValueError(f"`points` must hold at least one point to draw, got {points.shape}; pass some")
    sample_key, key = jax.random.split(key)
    count = points.shape[0] if count is None else count
    rows = jnp.arange(points.shape[0])
    if points.shape[0] > max(SAMPLE, 4 * k):
        real = count if weights is None else (weights > 0) & (rows < count)
        rows = sample(sample_key, real, max(SAMPLE, 4 * k))
    points = from_storage(as_storage(points)[rows], points.dtype)
    given = 1 if weights is None else weights[rows].astype(jnp.float32)
    weights = jnp.where(rows < count, given, 0).astype(jnp.float32)
    x = points.astype(jnp.float32).T
    batch = -(-k // ROUNDS)
    rounds = -(-k // batch)
    places = jax.random.uniform(key, (rounds, batch), jnp.float32)

    def draw_batch(distance: Array, places: Array) -> tuple[Array, Array]:
        share = weights * jnp.where(jnp.isinf(distance), 1, distance)
        share = jnp.where(share.max() > 0, share, weights)
        chosen = x[:, jax.vmap(draw, (None, 0))(share, places)]
        squares = jnp.sum((x[:, None, :] - chosen[:, :, None]) ** 2, axis=0)
        return jnp.minimum(distance, squares.min(axis=0)), chosen.T

    _, chosen = lax.scan(draw_batch, jnp.full(x.shape[1], jnp.inf, jnp.float32), places)
    return chosen.reshape(rounds * batch, -1)[:k]


def sample(key: Array, real: Bool[Array, " n"] | Int[Array, ""] | int, size: int) -> Int[Array, " size"]:
    """Indices of `size` of the real points (a number: the first so many), one from each of `size` stretches."""
    upto = jnp.cumsum(real.astype(jnp.int32)) if isinstance(real, jax.Array) and real.ndim else None
    total = real if upto is None else upto[-1]
    places = (jnp.arange(size, dtype=jnp.float32) + jax.random.uniform(key, (size,), jnp.float32)) / size
    nth = jnp.minimum((places * total).astype(jnp.int32), total - 1)
    return nth if upto is None else jnp.searchsorted(upto, nth, side="right")


def draw(mass: Float[Array, " n"], place: Float[Array, ""]) -> Int[Array, ""]:
    """The index at `place` (0 to 1) of the cumulated mass; never one whose mass is 0 while any is not.

    Sums of rows first, because a cumulated sum over all the points takes twenty times as long on a processor.
    """
    rows = in_chunks(mass[:, None], ROW)[:, :, 0]
    sums = rows.sum(axis=1)
    row, rest = pick(sums, place * sums.sum())
    column, _ = pick(rows[row], rest)
    return row * ROW + column


def pick(mass: Float[Array, " n"], place: Float[Array, ""]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The index that `place` falls on when the masses lie end to end, and how far into it; the largest if none."""
    ends = running_sum(mass)[1:]
    inside = (ends > place) & (mass > 0)
    index = jnp.where(inside.any(), jnp.argmax(inside), jnp.argmax(mass))
    return index, place - (ends[index] - mass[index])
