"""How a weight trains while it is to become quantized: as floating-point values that its layer sees otherwise.

A layer keeps such a weight as it is (the latent weight), and asks here what to compute with. The maths are functions
of arrays; the layers of `jaxvq.linen` and `jaxvq.nnx` only keep what they return. When training is over, `harden`
makes codes of it.
"""

import abc
import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxvq import _fit
from jaxvq._blocks import block_values, from_blocks
from jaxvq._method import blocks_of
from jaxvq._numerics import safe_divide
from jaxvq.array import Affine, Codebook, QuantizedArray, spread, symmetric_zero
from jaxvq.layout import Layout
from jaxvq.methods import AFFINE_BITS, AbstractMethod, KMeans, Symmetric, Uniform
from jaxvq.quantize import over_stack, stack_keys
from jaxvq.scalar import fake_quant

Arrays = dict[str, Array]


class AbstractTraining(abc.ABC):
    """What a layer computes with while its weight trains, and what becomes of the weight then."""

    @abc.abstractmethod
    def check(self, method: AbstractMethod) -> None:
        """Raises ValueError unless weights that shall be quantized by `method` can train in this way."""

    def learned(self, latent: Float[Array, "..."], method: Any, layout: Layout) -> Arrays:
        """What trains beside the latent weight, by name, at the start."""
        del latent, method, layout
        return {}

    def state(self, latent: Float[Array, "..."], method: Any, layout: Layout) -> Arrays:
        """What is remembered from step to step but has no gradient, by name, at the start."""
        del latent, method, layout
        return {}

    @abc.abstractmethod
    def weight(
        self,
        latent: Float[Array, "..."],
        extra: tuple[Arrays, Arrays],
        method: Any,
        layout: Layout,
        *,
        key: Array | None,
        train: bool,
    ) -> tuple[Float[Array, "..."], Arrays]:
        """What the layer computes with.

        Args:
          latent: the weight that trains, in the shape of the layout.
          extra: what `learned` and `state` began.
          method: how the weight will be quantized.
          layout: of the method.
          key: random key of this step; only `QuantNoise` takes one, and only in training.
          train: False to see the weight as it will be when it is quantized.

        Returns:
          The weight, and the state for the next step.
        """

    @abc.abstractmethod
    def harden(
        self, latent: Float[Array, "..."], extra: tuple[Arrays, Arrays], method: Any, layout: Layout, *, key: Array
    ) -> QuantizedArray:
        """The quantized weight: what `weight` computes with when `train` is False, as codes."""


@final
@dataclasses.dataclass(frozen=True)
class StraightThrough(AbstractTraining):
    """Quantization-aware training: rounded weights in the forward pass, straight-through gradients in the backward.

    For `Symmetric` and `Uniform` weights. The levels follow the latent weight, or are learned.

    Attributes:
      learned_step: the step size is a parameter of its own (of `Symmetric` only), whose gradient is scaled by
        `1 / sqrt(values * q_max)`.

    Sources: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2018, arXiv 1712.05877; Esser et al., "Learned Step Size Quantization", 2020, arXiv 1902.08153.

    Example:
      >>> method = Symmetric(bits=2)
      >>> latent = jnp.array([[-1.0, 0.2], [0.6, 1.0]])
      >>> layout = method.layout(latent.shape, latent.dtype)
      >>> StraightThrough().weight(latent, ({}, {}), method, layout, key=None, train=True)[0]
      Array([[-1.,  0.],
             [ 1.,  1.]], dtype=float32)
    """

    learned_step: bool = False

    def check(self, method: AbstractMethod) -> None:
        kinds = (Symmetric,) if self.learned_step else (Symmetric, Uniform)
        if not isinstance(method, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"`{self}` trains {names} weights, got {method}; "
                "palettes train by SoftAssignment, any codebook by QuantNoise or with its codes fixed (training=None)"
            )

    def learned(self, latent: Float[Array, "..."], method: Any, layout: Layout) -> Arrays:
        if not self.learned_step:
            return {}
        # A `Symmetric` of one bit has the mean size as half its step.
        mean_size = dataclasses.replace(method, bits=1).decoder(latent, layout).scale / 2
        return {"scale": 2 * mean_size / jnp.sqrt(_largest_level(method.bits))}

    def weight(self, latent, extra, method, layout, *, key, train) -> tuple[Float[Array, "..."], Arrays]:
        del key, train
        learned, state = extra
        return _rounded(latent, self._decoder(latent, learned, method, layout), method.bits, layout), state

    def harden(self, latent, extra, method, layout, *, key) -> QuantizedArray:
        del key
        decoder = self._decoder(latent, extra[0], method, layout)
        return _fit.encode(latent, None, decoder, layout=layout, bits=method.bits)

    def _decoder(self, latent: Array, learned: Arrays, method: Any, layout: Layout) -> Affine:
        if not self.learned_step:
            return lax.stop_gradient(method.decoder(lax.stop_gradient(latent), layout))
        values = layout.size / learned["scale"].size
        factor = 1 / jnp.sqrt(values * _largest_level(method.bits))
        return Affine(_scale_gradient(learned["scale"], factor))


@final
@dataclasses.dataclass(frozen=True)
class SoftAssignment(AbstractTraining):
    """Differentiable k-means: each weight is a mixture of the centroids near it, and draws them along as it trains.

    For `KMeans` palettes. In every step the centroids of the step before are refined by `iterations` rounds of soft
    k-means, with attention `softmax(-distance**2 / (temperature * variance))`, and the gradient flows through all of
    it. The variance is that of the palette's weights, so that one temperature does for all layers.

    Attributes:
      temperature: how soft the assignment is; near 0 it is that of k-means.
      iterations: rounds of soft k-means per step.

    Source: Cho, Alizadeh Vahid, Adya and Rastegari, "DKM: Differentiable k-Means Clustering Layer for Neural Network
    Compression", 2022, arXiv 2108.12659.

    Example:
      >>> SoftAssignment(temperature=0.01).check(KMeans(bits=2))
    """

    temperature: float = 0.01
    iterations: int = 5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}; use for example 0.01")
        if self.iterations < 1:
            raise ValueError(f"`iterations` must be at least 1, got {self.iterations}; use for example 5")

    def check(self, method: AbstractMethod) -> None:
        if not isinstance(method, KMeans):
            raise ValueError(
                f"`SoftAssignment` trains KMeans palettes, got {method}; other codebooks train by QuantNoise"
            )

    def state(self, latent: Float[Array, "..."], method: Any, layout: Layout) -> Arrays:
        blocks = blocks_of(layout, method.per)
        return {"codebook": _fit.palettes(latent, None, layout=layout, blocks=blocks, k=method.entries)}

    def weight(self, latent, extra, method, layout, *, key, train) -> tuple[Float[Array, "..."], Arrays]:
        state = extra[1]
        if not train:
            return self._assigned(latent, state, method, layout).dequantize(), state
        blocks = blocks_of(layout, method.per)
        values, mass = block_values(latent, None, layout, blocks)
        centre = safe_divide(jnp.sum(values * mass, axis=1), jnp.sum(mass, axis=1))[:, None]
        variance = safe_divide(jnp.sum(mass * (values - centre) ** 2, axis=1), jnp.sum(mass, axis=1))[:, None, None]
        sharpness = lax.stop_gradient(safe_divide(jnp.ones(()), self.temperature * variance))

        def attention(codebook: Float[Array, "p k"]) -> Float[Array, "p n k"]:
            distance = values[:, :, None] - codebook[:, None]
            return jax.nn.softmax(-sharpness * distance**2, axis=-1)

        @jax.checkpoint  # the attention of every round is k times the weight
        def refine(codebook: Float[Array, "p k"], _: None) -> tuple[Float[Array, "p k"], None]:
            shares = attention(codebook) * mass[:, :, None]
            sums = jnp.einsum("pnk,pn->pk", shares, values)
            total = jnp.sum(shares, axis=1)
            # A centroid that no weight is near stays where it is.
            return jnp.where(total > 1e-6, sums / jnp.maximum(total, 1e-6), codebook), None

        start = state["codebook"].reshape(-1, method.entries)
        codebook, _ = lax.scan(refine, start, length=self.iterations)
        mixed = jnp.einsum("pnk,pk->pn", attention(codebook), codebook)
        weight = layout.from_vectors(from_blocks(mixed[:, :, None], blocks, layout.grid))
        return weight, {"codebook": lax.stop_gradient(codebook).reshape(state["codebook"].shape)}

    def harden(self, latent, extra, method, layout, *, key) -> QuantizedArray:
        del key
        return self._assigned(latent, extra[1], method, layout)

    def _assigned(self, latent: Array, state: Arrays, method: Any, layout: Layout) -> QuantizedArray:
        codebook: Codebook = _fit.round_codebook(state["codebook"], method.codebook_dtype)
        return _fit.encode(latent, None, codebook, layout=layout, bits=_fit.code_bits(method.entries))


@final
@dataclasses.dataclass(frozen=True)
class QuantNoise(AbstractTraining):
    """Training with quantization noise on a random part of the weights, so that the network learns to stand it.

    In each step a fraction `rate` of the values of a `Symmetric` or `Uniform` weight is rounded. Of a weight for a
    codebook method the same fraction of its vectors is set to zero, the others scaled by `1 / (1 - rate)`. Gradients
    go straight through. Outside of training, `Symmetric` and `Uniform` weights are rounded whole, others are as they
    are.

    Attributes:
      rate: the fraction, above 0 and below 1 (1 for rounding, which then is straight-through training).

    Source: Stock et al., "Training with Quantization Noise for Extreme Model Compression", 2021, arXiv 2004.07320.

    Example:
      >>> QuantNoise(rate=0.1).check(KMeans(bits=2))
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"`rate` must be above 0 and at most 1, got {self.rate}; use for example 0.1")

    def check(self, method: AbstractMethod) -> None:
        if self.rate == 1 and not isinstance(method, Symmetric | Uniform):
            raise ValueError(f"`rate` must be below 1 for {method}, whose vectors are set to zero, got 1; use 0.1")

    def weight(self, latent, extra, method, layout, *, key, train) -> tuple[Float[Array, "..."], Arrays]:
        state = extra[1]
        rounds = isinstance(method, Symmetric | Uniform)
        if not train:
            return self._rounded(latent, method, layout) if rounds else latent, state
        if key is None:
            raise ValueError(f"`key` must be a random key to train with {self}, got None; give the layer a random key")
        groups, outs = layout.grid
        hit = jax.random.bernoulli(key, self.rate, (groups, outs, 1))
        if rounds:
            noisy = layout.to_vectors(self._rounded(latent, method, layout))
            return layout.from_vectors(jnp.where(hit, noisy, layout.to_vectors(latent))), state
        vectors = layout.to_vectors(latent)
        noisy = layout.from_vectors(jnp.where(hit, 0, vectors / (1 - self.rate)))
        return latent + lax.stop_gradient(noisy - latent), state

    def harden(self, latent, extra, method, layout, *, key) -> QuantizedArray:
        del extra
        return method.fit(latent, layout, key=key)

    def _rounded(self, latent: Array, method: Any, layout: Layout) -> Float[Array, "..."]:
        return _rounded(latent, lax.stop_gradient(method.decoder(latent, layout)), method.bits, layout)


def harden_layers(
    training: AbstractTraining,
    latent: Float[Array, "..."],
    extra: tuple[Arrays, Arrays],
    method: AbstractMethod,
    layout: Layout,
    *,
    key: Array,
) -> QuantizedArray:
    """`training.harden`, of each layer by itself where `latent` stacks several along leading axes."""

    def one(latent: Array, extra: tuple[Arrays, Arrays], own_key: Array) -> QuantizedArray:
        return training.harden(latent, extra, method, layout, key=own_key)

    stack = latent.shape[: latent.ndim - len(layout.shape)]
    return over_stack(one, stack, latent, extra, stack_keys(key, stack))


def check_layer(method: Any, training: Any, act_bits: Any, act_momentum: Any) -> None:
    """Refuses settings of a layer that are none or do not go together."""
    if method is not None and not isinstance(method, AbstractMethod):
        raise TypeError(f"`method` must be a method such as KMeans(bits=4) or None, got {method!r}")
    if training is not None and not isinstance(training, AbstractTraining):
        raise TypeError(f"`training` must be a way to train such as StraightThrough() or None, got {training!r}")
    if training is not None:
        if method is None:
            raise ValueError(
                f"`training` must come with a `method`, got {training} alone; add for example method=Symmetric(bits=4)"
            )
        training.check(method)
    whole = isinstance(act_bits, int) and not isinstance(act_bits, bool)
    if act_bits is not None and not (whole and 1 <= act_bits <= AFFINE_BITS):
        raise ValueError(f"`act_bits` must be a whole number from 1 to {AFFINE_BITS}, got {act_bits!r}; use 8 or 4")
    if act_momentum is not None and act_bits is None:
        raise ValueError(f"`act_momentum` must come with `act_bits`, got {act_momentum!r} alone; add act_bits=8")
    if act_momentum is not None and not 0 <= act_momentum < 1:
        raise ValueError(f"`act_momentum` must be at least 0 and below 1, got {act_momentum!r}; use 0.99")


def _rounded(latent: Float[Array, "..."], decoder: Affine, bits: int, layout: Layout) -> Float[Array, "..."]:
    """The latent weight on the levels of `decoder`, with straight-through gradients."""
    grid = layout.grid
    zero = None if decoder.zero_point is None else spread(decoder.zero_point, grid)
    return layout.from_vectors(fake_quant(layout.to_vectors(latent), spread(decoder.scale, grid), zero, bits))


def _largest_level(bits: int) -> float:
    """`q_max`, which is at least 1."""
    return max(1.0, symmetric_zero(bits))


def _scale_gradient(values: Float[Array, "*shape"], factor: Float[Array, ""]) -> Float[Array, "*shape"]:
    """`values`, whose gradient is multiplied by `factor`."""
    return lax.stop_gradient(values * (1 - factor)) + values * factor
