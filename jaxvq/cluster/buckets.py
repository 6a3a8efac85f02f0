"""Padding to a few sizes, so that a network of many shapes compiles few clustering programs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

_EXACT_ABOVE = 2**22
_SIZES_ALONE = (2**9, 2**16)
_LEAST_OF_SEVERAL = 2**4
_SIZE_OF_FEW = 2**10
_VALUES_OF_FEW = 2**16


def bucket(n: int) -> int:
    """The size that `n` is padded to: the next power of 4, and above four million the next multiple of that.

    Example:
      >>> bucket(300), bucket(5_000_000)
      (1024, 8388608)
    """
    if n > _EXACT_ABOVE:
        return -(-n // _EXACT_ABOVE) * _EXACT_ABOVE
    size = 1
    while size < n:
        size *= 4
    return size


def pad_problems(
    points: Shaped[Array, "p n *d"], weights: Float[Array, "p n *w"] | None
) -> tuple[Shaped[Array, "p1 n1 *d"], Float[Array, "p1 n1 *w"] | None]:
    """Pads `p` clustering problems of `n` points, so that few shapes are left; the padding has weight 0.

    Few small problems are padded to one size: a program takes longer to compile than to run on them. How many
    problems there are is padded to a number that their size decides, unless there are more of them.
    """
    p, n = points.shape[:2]
    size = bucket(n)
    if p == 1:
        rows, size = 1, _SIZES_ALONE[0] if n <= _SIZES_ALONE[0] else max(size, _SIZES_ALONE[1])
    else:
        size = max(size, _LEAST_OF_SEVERAL, min(_SIZE_OF_FEW, bucket(_VALUES_OF_FEW // p)))
        rows = max(1, _EXACT_ABOVE // size)
        rows = rows if p <= rows else bucket(p)
    pads = ((0, rows - p), (0, size - n))
    return jax.tree.map(lambda a: jnp.pad(a, (*pads, *((0, 0),) * (a.ndim - 2))), (points, weights))


def map_problems(
    solve: Callable[..., Float[Array, "*result"]],
    count: Int32[Array, ""],
    at_once: int,
    *arrays: Shaped[Array, "p ..."],
) -> Float[Array, "p *result"]:
    """`solve` for each of the first `count` problems, `at_once` of them at a time; zeros for the padding behind."""
    problems = arrays[0].shape[0]
    at_once = min(at_once, problems)
    many = jax.vmap(solve)
    shape = jax.eval_shape(many, *(jax.ShapeDtypeStruct((at_once, *a.shape[1:]), a.dtype) for a in arrays))

    def some(step: Array, results: Array) -> Array:
        start = jnp.minimum(step * at_once, problems - at_once)
        part = many(*(jax.lax.dynamic_slice_in_dim(a, start, at_once) for a in arrays))
        return jax.lax.dynamic_update_slice_in_dim(results, part, start, axis=0)

    steps = (count + at_once - 1) // at_once
    return jax.lax.fori_loop(0, steps, some, jnp.zeros((problems, *shape.shape[1:]), shape.dtype))
