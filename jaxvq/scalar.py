"""Fake quantization: values rounded to levels in the forward pass, gradients straight through in the backward pass."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxvq._numerics import safe_divide
from jaxvq.array import symmetric_zero


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fake_quant(
    x: Float[Array, "*shape"], scale: Float[Array, "..."], zero_point: Float[Array, "..."] | None, bits: int
) -> Float[Array, "*shape"]:
    """The nearest of `2**bits` levels, `(code - zero_point) * scale`, for each value.

    The gradient with respect to `x` is that of the identity where `x` lies within the levels, and 0 beyond them. At
    one bit without a zero point it is the incoming gradient clipped to [-1, 1]. The gradient with respect to `scale`
    is that of learned step sizes: the rounding error in steps within the levels, the outermost code beyond them.

    Args:
      x: the values.
      scale: the distance of two levels; broadcasts against `x`, of which it has the rank.
      zero_point: the code that stands for zero, likewise; None for levels symmetric about zero.
      bits: 1 to 8.

    Returns:
      The levels, in the dtype of `x`.

    Sources: Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013,
    arXiv 1308.3432; Esser et al., "Learned Step Size Quantization", 2020, arXiv 1902.08153.

    Example:
      >>> fake_quant(jnp.array([0.2, 0.4, 9.0]), jnp.array([0.5]), None, 3)
      Array([0. , 0.5, 1.5], dtype=float32)
    """
    return _levels(x, scale, zero_point, bits)[0]


def _levels(
    x: Float[Array, "*shape"], scale: Float[Array, "..."], zero_point: Float[Array, "..."] | None, bits: int
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The levels, and in units of `scale` where `x` and its level lie, counted from zero."""
    zero = jnp.float32(symmetric_zero(bits)) if zero_point is None else zero_point.astype(jnp.float32)
    position = safe_divide(x.astype(jnp.float32), jnp.broadcast_to(scale.astype(jnp.float32), x.shape)) + zero
    # At one bit the two levels lie beside zero, which counts as positive.
    nearest = jnp.floor(position + 0.5) if bits == 1 and zero_point is None else jnp.round(position)
    code = jnp.clip(nearest, 0, _last_code(zero_point, bits))
    return ((code - zero) * scale).astype(x.dtype), position - zero, code - zero


def _forward(x: Array, scale: Array, zero_point: Array | None, bits: int) -> tuple[Array, tuple]:
    return _levels(x, scale, zero_point, bits)[0], (x, scale, zero_point)


def _backward(bits: int, saved: tuple, gradient: Array) -> tuple[Array, Array, Array | None]:
    x, scale, zero_point = saved
    _, position, level = _levels(x, scale, zero_point, bits)
    gradient = gradient.astype(jnp.float32)
    zero = symmetric_zero(bits) if zero_point is None else zero_point
    inside = (position + zero >= 0) & (position + zero <= _last_code(zero_point, bits))
    # One bit: the levels lie at half a step, and no value is beyond them in a way that should stop it from learning.
    binary = bits == 1 and zero_point is None
    to_x = jnp.clip(gradient, -1, 1) if binary else jnp.where(inside, gradient, 0)
    to_scale = gradient * (level if binary else jnp.where(inside, level - position, level))
    to_zero = None
    if zero_point is not None:
        to_zero = _sum_like(jnp.where(inside, 0, -gradient * scale), zero_point)
    return to_x.astype(x.dtype), _sum_like(to_scale, scale), to_zero


def _last_code(zero_point: Float[Array, "..."] | None, bits: int) -> float:
    return 2 * symmetric_zero(bits) if zero_point is None else 2.0**bits - 1


def _sum_like(values: Float[Array, "..."], like: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Sums over the axes along which `like` was broadcast."""
    extra = values.ndim - like.ndim
    axes = tuple(range(extra)) + tuple(extra + axis for axis, n in enumerate(like.shape) if n == 1)
    return jnp.sum(values, axis=axes, keepdims=True).reshape(like.shape).astype(like.dtype)


fake_quant.defvjp(_forward, _backward)


def range_of(x: Float[Array, "..."]) -> Float[Array, "2"]:
    """The smallest and the largest value, in float32; zero lies between them."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return jnp.stack([jnp.minimum(jnp.min(x), 0), jnp.maximum(jnp.max(x), 0)])


def track_range(tracked: Float[Array, "2"], x: Float[Array, "..."], momentum: float) -> Float[Array, "2"]:
    """The exponential moving average of the ranges of batches. NaN stands for a range that has seen none yet.

    Example:
      >>> tracked = track_range(jnp.array([jnp.nan, jnp.nan]), jnp.array([-1.0, 2.0]), momentum=0.9)
      >>> track_range(tracked, jnp.array([-1.0, 4.0]), momentum=0.9)
      Array([-1. ,  2.2], dtype=float32)
    """
    batch = range_of(x)
    return jnp.where(jnp.isnan(tracked), batch, momentum * tracked + (1 - momentum) * batch)


def fake_quant_range(x: Float[Array, "*shape"], span: Float[Array, "2"], bits: int) -> Float[Array, "*shape"]:
    """`fake_quant` with evenly spaced levels over a range, for activations.

    Args:
      x: the values.
      span: the smallest and the largest level; where it is NaN, the range of `x` takes its place.
      bits: 1 to 8.

    Example:
      >>> fake_quant_range(jnp.array([0.2, 1.4, 9.0]), jnp.array([0.0, 3.0]), 2)
      Array([0., 1., 3.], dtype=float32)
    """
    low, high = jnp.where(jnp.isnan(span), range_of(x), span)
    scale = (high - low) / (2**bits - 1)
    scale = jnp.where(scale > 0, scale, 1)
    one = (1,) * x.ndim
    return fake_quant(x, scale.reshape(one), (-low / scale).reshape(one), bits)
