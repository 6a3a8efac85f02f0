"""Every choice made for the safety of floating-point numbers, each a function with its reason."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped


def safe_divide(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`a / b`, and 0 where `b` is 0: the mean of an empty cluster must not poison a sum with NaN."""
    nonzero = b != 0
    return jnp.where(nonzero, a / jnp.where(nonzero, b, 1), 0)


def matmul(a: Float[Array, "*i j"], b: Float[Array, "j l"]) -> Float[Array, "*i l"]:
    """`a @ b` in float32: a bfloat16 or TF32 product moves nearly one point in a hundred to a wrong centroid."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def running_sum(values: Float[Array, "*rows n"]) -> Float[Array, "*rows n1"]:
    """Sums of the first 0, 1, ... n values along the last axis, in float32 (counts are exact below 2**24).

    Blocks of 256 times a triangle of ones, then the sums of the blocks likewise. `jnp.cumsum` unrolls into hundreds
    of operations, which take a second to compile, and one long sum would lose more digits.
    """
    n = values.shape[-1]
    length = min(n, 256)
    rows = jnp.pad(values, (*((0, 0),) * (values.ndim - 1), (0, -n % length))).reshape(*values.shape[:-1], -1, length)
    inside = matmul(rows, jnp.triu(jnp.ones((length, length + 1), jnp.float32), 1))
    if n == length:
        return inside[..., 0, :]
    before = running_sum(inside[..., -1])
    sums = (before[..., :-1, None] + inside[..., :-1]).reshape(*values.shape[:-1], -1)
    return jnp.concatenate([sums[..., :n], before[..., -1:]], axis=-1)


def scale_up_to(largest: Float[Array, "*shape"], exponent: int) -> Float[Array, "*shape"]:
    """The power of two that takes `largest` to at most `2**exponent`; 1 or so for 0.

    Made from its bits: `exp2` and `log2` are only nearly exact, and multiplying by anything but a power of two rounds.
    """
    above = lax.bitcast_convert_type(largest, jnp.int32) // 2**23 - 126  # largest < 2**above
    power = jnp.clip(exponent - jnp.where(largest > 0, above, 0), -126, 126)
    return lax.bitcast_convert_type((power + 127) * 2**23, jnp.float32)


def as_storage(values: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """16-bit floats as the integers of their bits, anything else as it is; `from_storage` undoes it.

    For arrays that are sliced or transposed whole: XLA's CPU backend first widens an array of 16-bit floats to
    float32, which takes twice its memory.
    """
    sixteen = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize == 2
    return lax.bitcast_convert_type(values, jnp.uint16) if sixteen else values


def from_storage(values: Shaped[Array, "*shape"], dtype: Any) -> Shaped[Array, "*shape"]:
    """Values of `dtype` from what `as_storage` returned."""
    return values if values.dtype == dtype else lax.bitcast_convert_type(values, dtype)


def safe_sqrt(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The square root, with gradient 0 at 0: its own is infinite there, and NaN after the chain rule."""
    nonzero = values != 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, values, 1)), 0)
