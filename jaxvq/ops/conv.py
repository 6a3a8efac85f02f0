"""Convolutions with quantized kernels."""

from typing import Any

from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxvq.array import QuantizedArray, as_floats


def conv(
    x: Float[Array, "..."],
    kernel: QuantizedArray | Shaped[Array, "..."],
    window_strides: Any,
    padding: Any,
    **options: Any,
) -> Float[Array, "..."]:
    """`jax.lax.conv_general_dilated` with a quantized kernel, in the dtype of `x`; the options are its own.

    Example:
      >>> import jax, jax.numpy as jnp, jaxvq
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 16, 32))
      >>> kernel = jaxvq.quantize_params(kernel, jaxvq.KMeans(bits=4), key=jax.random.key(1))
      >>> images = jnp.ones((1, 8, 8, 16))
      >>> conv(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
      (1, 8, 8, 32)
    """
    return lax.conv_general_dilated(x, as_floats(kernel, x.dtype), window_strides, padding, **options)


def conv_transpose(
    x: Float[Array, "..."],
    kernel: QuantizedArray | Shaped[Array, "..."],
    strides: Any,
    padding: Any,
    **options: Any,
) -> Float[Array, "..."]:
    """`jax.lax.conv_transpose` with a quantized kernel, in the dtype of `x`; the options are its own.

    Example:
      >>> import jax, jax.numpy as jnp, jaxvq
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 16, 32))
      >>> kernel = jaxvq.quantize_params(kernel, jaxvq.KMeans(bits=4), key=jax.random.key(1))
      >>> conv_transpose(jnp.ones((1, 8, 8, 16)), kernel, (2, 2), "SAME").shape
      (1, 16, 16, 32)
    """
    return lax.conv_transpose(x, as_floats(kernel, x.dtype), strides, padding, **options)
