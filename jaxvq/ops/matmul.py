"""The product of activations and a quantized matrix."""

from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxvq.array import QuantizedArray, as_floats


def matmul(
    x: Float[Array, "*batch a"],
    w: QuantizedArray | Shaped[Array, "_ _"],
    *,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*batch b"]:
    """`x @ w`, or `x @ w.T`, in the dtype of `x`.

    Differentiable in `x` and in the decoder of `w`: each codebook entry receives the sum of the gradients of the
    weights that it stands for.

    Args:
      x: the activations.
      w: the weight, quantized or not, `[a, b]`.
      transpose: the weight is `[b, a]`, as that of an output layer tied to an embedding or of PyTorch's `Linear`.
      precision: of the product; see `jax.lax.Precision`.

    Raises:
      ValueError: for a weight that is no matrix or does not fit `x`.

    Example:
      >>> import jax, jaxvq
      >>> weight = jax.random.normal(jax.random.key(0), (64, 32))
      >>> quantized = jaxvq.quantize_params(weight, jaxvq.KMeans(bits=4), key=jax.random.key(1))
      >>> matmul(jnp.ones((8, 64)), quantized).shape
      (8, 32)
    """
    axis = 1 if transpose else 0
    if len(w.shape) != 2 or x.ndim < 1 or x.shape[-1] != w.shape[axis]:
        form = "[b, a]" if transpose else "[a, b]"
        raise ValueError(
            f"`w` must be {form} for `x` of shape [..., a] = {x.shape}, got {w.shape}; "
            "stacked layers go through jax.vmap or jax.lax.scan, other weights through w.dequantize()"
        )
    return lax.dot_general(x, as_floats(w, x.dtype), (((x.ndim - 1,), (axis,)), ((), ())), precision=precision)
