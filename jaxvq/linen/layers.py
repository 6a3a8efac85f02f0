"""Flax's own layers, with a weight that is or becomes quantized."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array

from jaxvq.array import is_quantized, partition
from jaxvq.layout import Layout
from jaxvq.linen.variables import Latent, Whole, join_halves, with_names
from jaxvq.methods import AbstractMethod
from jaxvq.ops.matmul import matmul
from jaxvq.ops.take import take
from jaxvq.scalar import fake_quant_range, range_of, track_range
from jaxvq.training import AbstractTraining, check_layer


class _Quantized(nn.Module):
    """What the layers share; see `Dense`."""

    method: AbstractMethod | None = None
    training: AbstractTraining | None = None
    act_bits: int | None = None
    act_momentum: float | None = None

    _weight_name = "kernel"
    __no_type_check__ = True  # of the fields: some of Flax's have types that cannot be checked at run time

    def __post_init__(self) -> None:
        check_layer(self.method, self.training, self.act_bits, self.act_momentum)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        return _bare(super().__call__)(self, self._rounded(inputs, self._range()))

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *init_args: Any, unbox: bool = True, **init_kwargs: Any) -> Any:
        """As `nn.Module.param`, except that the weight is what the layer shall compute with."""
        if name != self._weight_name:
            return nn.Module.param(self, name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        return _decoded(self._weight(name, init_fn, *init_args, **init_kwargs))

    @nn.nowrap
    def _out_axis(self) -> int:
        return -1

    @nn.nowrap
    def _weight(self, name: str, init_fn: Any, shape: Any, dtype: Any) -> Any:
        """A `QuantizedArray` or a float array."""
        stored, where = self.get_variable("params", name), "/".join((*self.path, name))
        method: Any = self.method
        is_whole = isinstance(stored, Whole)
        if not is_whole and method is None:
            return nn.Module.param(self, name, init_fn, shape, dtype)
        if not is_whole and self.training is not None:
            return self._latent(name, nn.Module.param(self, name, init_fn, shape, dtype, unbox=False))

        def begin(key: Array) -> Any:
            if stored is not None:
                return stored  # so that no k-means is traced
            if not self.is_mutable_collection("codes"):
                raise ValueError(
                    f'{where}: "codes" must be mutable where the weight is initialized, got an immutable collection; '
                    'list it in nn.scan, nn.vmap and `mutable` where they list "params"'
                )
            weight, layout = init_fn(key, shape, dtype), self._layout(where, shape, dtype)
            array = method.fit(meta.unbox(weight), layout, key=jax.random.fold_in(key, 1))
            trainable, frozen = (with_names(half, weight, layout) for half in partition(array))
            self.put_variable("codes", name, frozen)
            return trainable

        half = nn.Module.param(self, name, begin, unbox=False)
        codes = self.get_variable("codes", name)
        array = stored.array if is_whole else join_halves(where, half, codes)
        if array.shape != tuple(shape):
            raise ValueError(f"{where}: the weight must have shape {tuple(shape)}, got {array.shape}; check the inputs")
        return array

    @nn.nowrap
    def _latent(self, name: str, box: Any) -> Array:
        """What the layer computes with while the weight trains."""
        training: Any = self.training
        method: Any = self.method
        latent = jnp.asarray(meta.unbox(box))
        layout = self._layout("/".join((*self.path, name)), latent.shape, latent.dtype)

        def begin(kind: Any) -> Any:
            return with_names(kind(latent, method, layout), box, layout)

        learned = {
            part: nn.Module.param(self, f"{name}_{part}", lambda _, part=part: begin(training.learned)[part])
            for part in jax.eval_shape(lambda: begin(training.learned))
        }
        # Where there is a state it is not begun again, not even for its shapes: that may take k-means.
        has_state = self.has_variable("quantization", name) or jax.eval_shape(lambda: begin(training.state))
        state = self.variable("quantization", name, lambda: begin(training.state)) if has_state else None
        extra = learned, state.value if state else {}
        if isinstance(box, Latent):
            self.put_variable("params", name, Latent(latent, *extra, (training, method, layout)))
        noisy, remembers = self.has_rng("quant_noise"), self.is_mutable_collection("quantization")
        train = (noisy or remembers) and not self.is_initializing()
        key = self.make_rng("quant_noise") if train and noisy else None
        weight, after = training.weight(latent, extra, method, layout, key=key, train=train)
        if state and train and remembers:
            state.value = after
        return weight

    @nn.nowrap
    def _layout(self, where: str, shape: Any, dtype: Any) -> Layout:
        method: Any = self.method
        try:
            layout = method.layout(tuple(shape), dtype, out_axis=self._out_axis())
            method.template(layout)  # refuses weights that are too small
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return layout

    @nn.nowrap
    def _range(self) -> Any:
        if self.act_momentum is None:
            return None
        return self.variable("quantization", "input_range", lambda: jnp.full(2, jnp.nan))

    @nn.nowrap
    def _rounded(self, inputs: Any, tracked: Any) -> Any:
        """The inputs as the layer sees them."""
        if self.act_bits is None:
            return inputs
        (inputs,) = promote_dtype(inputs)
        if tracked and tracked.is_mutable() and not self.is_initializing():
            tracked.value = track_range(tracked.value, inputs, self.act_momentum)  # type: ignore[arg-type]
        return fake_quant_range(inputs, tracked.value if tracked else range_of(inputs), self.act_bits)


class Dense(_Quantized, nn.Dense):
    """`flax.linen.Dense` with a quantized kernel. Takes its arguments, and these:

    Attributes:
      method: how the kernel is quantized; None for Flax's own layer. Alone it starts from the codes of the initial
        kernel, and the codebook trains.
      training: keeps the kernel float while it trains, in this way; `harden` makes codes of it. The layer trains where
        "quantization" is mutable or `rngs` has a `quant_noise` (which `QuantNoise` needs). Elsewhere the kernel is
        what `training` says it is outside of training: in most cases what it will be when it is quantized.
      act_bits: rounds the inputs to so many bits, 1 to 8.
      act_momentum: the range of the inputs is an exponential moving average with this momentum, updated where
        "quantization" is mutable; None takes it from each batch.

    Raises:
      TypeError: for a `method` or `training` that is none.
      ValueError: for settings that do not go together, a kernel that is too small for the method, and variables that
        do not belong to the layer.

    Example:
      >>> from jaxvq import KMeans
      >>> layer, inputs = Dense(32, method=KMeans(bits=4)), jnp.ones((8, 64))
      >>> variables = layer.init(jax.random.key(0), inputs)
      >>> layer.apply(variables, inputs).shape, variables["codes"]["kernel"].codes.bits
      ((8, 32), 4)
    """

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        inputs = self._rounded(inputs, self._range())
        if self.dot_general is not None or self.dot_general_cls is not None or self.promote_dtype is not promote_dtype:
            return _bare(nn.Dense.__call__)(self, inputs)
        kernel = self._weight("kernel", self.kernel_init, (jnp.shape(inputs)[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        # A scalar stands for the kernel, of which only the dtype counts here.
        inputs, _, bias = promote_dtype(inputs, jnp.zeros((), kernel.dtype), bias, dtype=self.dtype)
        outputs = matmul(inputs, kernel, precision=self.precision)
        return outputs if bias is None else outputs + bias


class DenseGeneral(_Quantized, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with a quantized kernel; see `Dense` for the arguments that are not Flax's.

    Example:
      >>> from jaxvq import KMeans
      >>> layer, inputs = DenseGeneral((4, 8), method=KMeans(bits=4)), jnp.ones((8, 64))
      >>> layer.apply(layer.init(jax.random.key(0), inputs), inputs).shape
      (8, 4, 8)
    """


class Conv(_Quantized, nn.Conv):
    """`flax.linen.Conv` with a quantized kernel; see `Dense` for the arguments that are not Flax's.

    Example:
      >>> from jaxvq import KMeans
      >>> layer, inputs = Conv(32, (3, 3), method=KMeans(bits=4)), jnp.ones((1, 8, 8, 16))
      >>> layer.apply(layer.init(jax.random.key(0), inputs), inputs).shape
      (1, 8, 8, 32)
    """


class ConvTranspose(_Quantized, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with a quantized kernel; see `Dense` for the arguments that are not Flax's.

    Example:
      >>> from jaxvq import KMeans
      >>> layer, inputs = ConvTranspose(32, (3, 3), (2, 2), method=KMeans(bits=4)), jnp.ones((1, 8, 8, 16))
      >>> layer.apply(layer.init(jax.random.key(0), inputs), inputs).shape
      (1, 16, 16, 32)
    """

    @nn.nowrap
    def _out_axis(self) -> int:
        return -2 if self.transpose_kernel else -1


class Embed(_Quantized, nn.Embed):
    """`flax.linen.Embed` with a quantized table; see `Dense` for the arguments that are not Flax's.

    Looking up decodes only the rows that are asked for. What `act_bits` rounds is the query of `attend`.

    Example:
      >>> from jaxvq import KMeans
      >>> layer, ids = Embed(1000, 64, method=KMeans(bits=4)), jnp.array([3, 14])
      >>> layer.apply(layer.init(jax.random.key(0), ids), ids).shape
      (2, 64)
    """

    _weight_name = "embedding"

    @nn.nowrap
    def _out_axis(self) -> int:
        return 0

    def setup(self) -> None:
        shape = (self.num_embeddings, self.features)
        self._table = self._weight("embedding", self.embedding_init, shape, self.param_dtype)
        self._tracked = self._range()
        self._through_ops = is_quantized(self._table) and self.promote_dtype is promote_dtype

    @property
    def embedding(self) -> Array:
        """The table as floats."""
        return _decoded(self._table)

    def __call__(self, inputs: Any) -> Array:
        whole = jnp.issubdtype(inputs.dtype, jnp.integer)
        if not self._through_ops or not whole or self.num_embeddings == 1:
            return _bare(nn.Embed.__call__)(self, inputs)  # which refuses what is not whole
        return promote_dtype(take(self._table, jnp.asarray(inputs)), dtype=self.dtype, inexact=False)[0]

    def attend(self, query: Any) -> Array:
        query = self._rounded(query, self._tracked)
        if not self._through_ops:
            return _bare(nn.Embed.attend)(self, query)
        query, _ = promote_dtype(query, jnp.zeros((), self._table.dtype), dtype=self.dtype)
        return matmul(query, self._table, transpose=True)


def _bare(method: Any) -> Any:
    """A method of Flax without what Flax does around each call: `capture_intermediates` would see the call twice."""
    return method.__wrapped__


def _decoded(weight: Any) -> Array:
    return weight.dequantize() if is_quantized(weight) else weight
