"""Flax's own layers, with a weight that is or becomes quantized."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from jaxvq.methods import AbstractMethod
from jaxvq.nnx.weights import Latent, Quantized, TrainingState, annotations_of
from jaxvq.ops.matmul import matmul
from jaxvq.ops.take import take
from jaxvq.scalar import fake_quant_range, range_of, track_range
from jaxvq.training import AbstractTraining, QuantNoise, check_layer


class Layer(nnx.Module):
    """What the layers share: the four arguments that Flax's layers lack. See `Linear`."""

    act_bits: int | None = None
    act_momentum: float | None = None
    deterministic: bool = False
    input_range: TrainingState

    def __init__(
        self,
        *args: Any,
        rngs: nnx.Rngs,
        method: AbstractMethod | None = None,
        training: AbstractTraining | None = None,
        act_bits: int | None = None,
        act_momentum: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_layer(method, training, act_bits, act_momentum)
        super().__init__(*args, rngs=rngs, **kwargs)  # type: ignore[call-arg]
        if act_bits is not None:
            round_inputs(self, act_bits, act_momentum)
        if method is None:
            return
        param = getattr(self, weight_name(self))
        layout = method.layout(param.shape, param.dtype, out_axis=out_axis(self))
        method.template(layout)  # refuses a weight that is too small
        if training is None:
            weight = Quantized(method.fit(param.get_value(), layout, key=rngs.params()), annotations_of(param))
        else:
            key = rngs.quant_noise() if isinstance(training, QuantNoise) else None
            weight = Latent(param, method, training, layout, key=key)
        setattr(self, weight_name(self), weight)

    def _rounded(self, inputs: Any) -> Any:
        """The inputs, rounded to `act_bits`; in training this updates their range."""
        if self.act_bits is None:
            return inputs
        (inputs,) = promote_dtype((inputs,))
        if self.act_momentum is None:
            return fake_quant_range(inputs, range_of(inputs), self.act_bits)
        if not self.deterministic:
            self.input_range.set_value(track_range(self.input_range.get_value(), inputs, self.act_momentum))
        return fake_quant_range(inputs, self.input_range.get_value(), self.act_bits)


class Linear(Layer, nnx.Linear):
    """`flax.nnx.Linear` with a quantized kernel. Takes its arguments, and these:

    Args:
      method: how the kernel is quantized; None for Flax's own layer. Alone, it starts from the codes of the initial
        kernel, which stay, and the codebook trains.
      training: keeps the kernel float while it trains, in this way; `harden_model` makes codes of it.
      act_bits: rounds the inputs to so many bits, 1 to 8.
      act_momentum: the range of the inputs is a moving average over the batches of training, with this momentum;
        None takes it from each batch.

    Raises:
      ValueError: for arguments that do not go together, and a kernel that is too small for the method.

    Example:
      >>> import jaxvq
      >>> layer = Linear(64, 32, method=jaxvq.KMeans(bits=4), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 64))).shape, layer.kernel.array.bits_per_weight
      ((8, 32), 4.25)
    """

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Float[Array, "..."]:
        inputs = self._rounded(inputs)
        plain = self.dot_general is lax.dot_general and self.promote_dtype is promote_dtype
        special = out_sharding is not None or self.preferred_element_type is not None
        if not isinstance(self.kernel, Quantized) or not plain or special:
            return super().__call__(inputs, out_sharding)
        array = self.kernel.array
        bias = None if self.bias is None else self.bias[...]
        # Only the dtype of the kernel counts here: a scalar stands for it.
        inputs, _, bias = promote_dtype((inputs, jnp.zeros((), array.dtype), bias), dtype=self.dtype)
        outputs = matmul(inputs, array, precision=self.precision)
        return outputs if bias is None else outputs + bias


class Conv(Layer, nnx.Conv):
    """`flax.nnx.Conv` with a quantized kernel; `Linear` says which arguments it takes beside Flax's.

    Example:
      >>> import jaxvq
      >>> layer = Conv(16, 32, (3, 3), method=jaxvq.KMeans(bits=4), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 8, 8, 16))).shape
      (1, 8, 8, 32)
    """

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Float[Array, "..."]:
        return super().__call__(self._rounded(inputs), out_sharding)


class ConvTranspose(Layer, nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` with a quantized kernel; `Linear` says which arguments it takes beside Flax's.

    Example:
      >>> import jaxvq
      >>> layer = ConvTranspose(16, 32, (3, 3), (2, 2), method=jaxvq.KMeans(bits=4), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 8, 8, 16))).shape
      (1, 16, 16, 32)
    """

    def __call__(self, inputs: Any) -> Float[Array, "..."]:
        return super().__call__(self._rounded(inputs))


class Embed(Layer, nnx.Embed):
    """`flax.nnx.Embed` with a quantized table; `Linear` says which arguments it takes beside Flax's.

    Looking up decodes the rows that are asked for and no others. What `act_bits` rounds is the query of `attend`.

    Example:
      >>> import jaxvq
      >>> layer = Embed(1000, 64, method=jaxvq.KMeans(bits=4), rngs=nnx.Rngs(0))
      >>> layer(jnp.array([3, 14])).shape
      (2, 64)
    """

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Float[Array, "..."]:
        known = jnp.issubdtype(inputs.dtype, jnp.integer) and self.num_embeddings > 1
        if not known or out_sharding is not None or not self._is_plain():
            return super().__call__(inputs, out_sharding)
        return take(self.embedding.array, jnp.asarray(inputs)).astype(self.dtype)

    def attend(self, query: Any, out_sharding: Any = None) -> Float[Array, "..."]:
        query = self._rounded(query)
        if out_sharding is not None or not self._is_plain():
            return super().attend(query, out_sharding)
        array = self.embedding.array
        query, _ = promote_dtype((query, jnp.zeros((), array.dtype)), dtype=self.dtype)
        return matmul(query, array, transpose=True)

    def _is_plain(self) -> bool:
        return isinstance(self.embedding, Quantized) and self.promote_dtype is promote_dtype


LAYERS: dict[type, type] = {
    nnx.Linear: Linear,
    nnx.Conv: Conv,
    nnx.ConvTranspose: ConvTranspose,
    nnx.Embed: Embed,
}


def adopt(module: Any) -> None:
    """Makes a quantized layer of one of Flax's own, which stays the same object for whatever else refers to it."""
    if type(module) in LAYERS:
        object.__setattr__(module, "__class__", LAYERS[type(module)])


def release(layer: Any) -> None:
    """Undoes `adopt` and `round_inputs`."""
    for name in ("act_bits", "act_momentum", "deterministic", "input_range"):
        if name in vars(layer):
            delattr(layer, name)
    for flax_layer, own in LAYERS.items():
        if type(layer) is own:
            object.__setattr__(layer, "__class__", flax_layer)


def round_inputs(layer: Layer, act_bits: int, act_momentum: float | None) -> None:
    """Makes a layer round its inputs, with a range for each of the layers that it stacks."""
    layer.act_bits, layer.act_momentum = act_bits, act_momentum
    if act_momentum is not None:
        weight = getattr(layer, weight_name(layer))
        stack = weight.shape[: weight.ndim - (weight_rank(layer, weight_name(layer)) or weight.ndim)]
        layer.input_range = TrainingState(jnp.full((*stack, 2), jnp.nan))


def weight_name(layer: Any) -> str:
    """The attribute that may be quantized."""
    return "embedding" if isinstance(layer, nnx.Embed) else "kernel"


def weight_rank(layer: Any, name: Any) -> int | None:
    """The rank of the weight of one Flax layer, without axes that stack several; None for another weight or module."""
    if name != weight_name(layer):
        return None
    match layer:
        case nnx.Linear() | nnx.Embed():
            return 2
        case nnx.Conv() | nnx.ConvTranspose() | nnx.Einsum():
            return len(layer.kernel_shape)
        case nnx.LinearGeneral():
            return len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
    return None


def out_axis(layer: Any) -> int:
    """The axis of output features of a layer's weight, as `jaxvq.Rule` has it."""
    if isinstance(layer, nnx.Embed):
        return 0
    return -2 if isinstance(layer, nnx.ConvTranspose) and layer.transpose_kernel else -1
