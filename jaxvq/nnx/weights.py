"""The nodes of a module graph that stand where an `nnx.Param` stood."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from jaxvq._pytree import key_name
from jaxvq.array import QuantizedArray
from jaxvq.layout import Layout
from jaxvq.methods import AbstractMethod
from jaxvq.quantize import over_stack
from jaxvq.training import AbstractTraining, QuantNoise, harden_layers

OPERATORS = ("neg", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul", "rmatmul")
SHARDING = ("out_sharding", "mesh", "sharding_rules", "eager_sharding")


class Codes(nnx.Variable):
    """Packed codes, and codebooks of integers: no parameter, so nothing trains it."""


class TrainingState(nnx.Variable):
    """What training remembers from step to step: soft codebooks, ranges of inputs."""


class Weight(nnx.Module):
    """What reads like an `nnx.Param`: `weight[...]`, `weight.T`, `x @ weight`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The rank of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Values in the weight."""
        return math.prod(self.shape)

    @property
    def value(self) -> Float[Array, "..."]:
        """The weight as an array."""
        return self.get_value()

    def get_value(self) -> Float[Array, "..."]:
        """The weight as an array."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Shaped[Array, "..."]:
        return self.get_value() if index is ... else self.get_value()[index]

    def __jax_array__(self) -> Float[Array, "..."]:
        return self.get_value()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.get_value(), dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.get_value(), name)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.get_value(), name)(*others)


for _name in OPERATORS:
    setattr(Weight, f"__{_name}__", _operator(f"__{_name}__"))


class Quantized(Weight):
    """A quantized weight in a module graph.

    Its variables are the arrays of a `QuantizedArray`: `words` (the codes), `vectors`, `scale`, `zero_point`.

    Args:
      array: the weight.
      annotations: how the weight is sharded, as `nnx.Param` takes it: `out_sharding` (for each axis a name or None),
        `mesh`, `sharding_rules`, `eager_sharding`. A name carries over to those axes of the variables that are as
        long as the axis of the weight, which the packed axis of the codes is not.

    Example:
      >>> import jaxvq
      >>> weight = jaxvq.quantize_params(jnp.ones((64, 32)), jaxvq.KMeans(bits=4), key=jax.random.key(0))
      >>> Quantized(weight)[...].shape
      (64, 32)
    """

    def __init__(self, array: QuantizedArray, annotations: Mapping[str, Any] | None = None) -> None:
        # The structure of the array, with the names of the variables for leaves: hashable, as static data must be.
        self.template = jax.tree.map_with_path(lambda path, _: key_name(path[-1]), array)
        own = dict(annotations or {})
        names = own.get("out_sharding")
        names = None if names is None else (*names, *(None,) * (array.ndim - len(names)))
        self.names = None if names is None else names[len(array.stack) :]
        for path, leaf in jax.tree.leaves_with_path(array):
            if names is not None:
                own["out_sharding"] = _part_names(names, array, leaf.shape)
            kind = nnx.Param if jnp.issubdtype(leaf.dtype, jnp.floating) else Codes
            setattr(self, key_name(path[-1]), kind(leaf, **own))

    @property
    def array(self) -> QuantizedArray:
        """The weight as codes, decoder and layout."""
        return jax.tree.map(lambda name: getattr(self, name).get_value(), self.template)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.array.dtype

    def get_value(self) -> Float[Array, "..."]:
        """The decoded weight; differentiable in the decoder."""
        return self.array.dequantize()


class Latent(Weight):
    """A floating-point weight that trains while it is to become quantized, and reads as `training` sees it.

    `model.eval()` and `model.train()` switch `deterministic`: outside of training it reads as the quantized weight
    will, and remembers nothing.

    Args:
      weight: the parameter; the same object is kept.
      method: how it will be quantized.
      training: how it trains.
      layout: of the method, for one layer where `weight` stacks several along leading axes.
      key: random key of its stream `quant_noise`; only `QuantNoise` needs one.

    Example:
      >>> import jaxvq
      >>> weight, method = nnx.Param(jnp.array([[-1.0, 0.2], [0.6, 1.0]])), jaxvq.Symmetric(bits=2)
      >>> Latent(weight, method, jaxvq.StraightThrough(), method.layout((2, 2), "float32"))[...]
      Array([[-1.,  0.],
             [ 1.,  1.]], dtype=float32)
    """

    def __init__(
        self,
        weight: nnx.Param,
        method: AbstractMethod,
        training: AbstractTraining,
        layout: Layout,
        *,
        key: Array | None = None,
    ) -> None:
        self.weight = weight
        self.method, self.training, self.layout = method, training, layout
        self.deterministic = False
        if key is not None and isinstance(training, QuantNoise):
            self.noise = nnx.RngStream(jax.random.split(key, self._stack) if self._stack else key, tag="quant_noise")
        self.restart()

    def restart(self) -> None:
        """Begins anew from the value that `weight` has now."""
        latent, stack = self.weight.get_value(), self._stack
        learned = over_stack(lambda one: self.training.learned(one, self.method, self.layout), stack, latent)
        state = over_stack(lambda one: self.training.state(one, self.method, self.layout), stack, latent)
        self.learned = nnx.Dict({name: nnx.Param(value) for name, value in learned.items()})
        self.state = nnx.Dict({name: TrainingState(value) for name, value in state.items()})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.weight.dtype

    @property
    def _stack(self) -> tuple[int, ...]:
        return self.shape[: self.ndim - len(self.layout.shape)]

    def get_value(self) -> Float[Array, "..."]:
        """What a layer computes with; in training this updates the state."""
        train = not self.deterministic

        def see(latent: Array, extra: Any, key: Array | None) -> tuple[Array, dict[str, Array]]:
            return self.training.weight(latent, extra, self.method, self.layout, key=key, train=train)

        for _ in self._stack:
            see = jax.vmap(see)
        weight, state = see(self.weight.get_value(), self._extra(), self._next_key() if train else None)
        if train:
            for name, value in state.items():
                self.state[name].set_value(value)
        return weight

    def harden(self, key: Array) -> QuantizedArray:
        """The quantized weight that it has become."""
        latent = self.weight.get_value()
        return harden_layers(self.training, latent, self._extra(), self.method, self.layout, key=key)

    def _extra(self) -> tuple[dict[str, Array], dict[str, Array]]:
        learned, state = ({name: v.get_value() for name, v in kind.items()} for kind in (self.learned, self.state))
        return learned, state

    def _next_key(self) -> Array | None:
        if "noise" not in vars(self):
            return None
        draw = jax.random.fold_in
        for _ in self._stack:
            draw = jax.vmap(draw)
        key = draw(self.noise.key.get_value(), self.noise.count.get_value())
        self.noise.count.set_value(self.noise.count.get_value() + 1)
        return key


def annotations_of(weight: Any) -> dict[str, Any]:
    """How a variable or a weight is sharded, as `nnx.Param` takes it; nothing if it is not."""
    weight = weight.weight if isinstance(weight, Latent) else weight
    variable = weight.words if isinstance(weight, Quantized) else weight
    found = {name: value for name, value in variable.get_metadata().items() if name in SHARDING}
    names = found.get("out_sharding")
    if names is None:
        return {}
    if isinstance(weight, Quantized):
        # Stacked axes come and go in the annotations of the variables (`nnx.vmap`, `nnx.scan`), the others do not.
        names = (*names[: len(weight.array.stack)], *(weight.names or ()))
    return found | {"out_sharding": names}


def _part_names(names: tuple[Any, ...], array: QuantizedArray, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The names of the axes of one of the arrays in `array`, the axes of which have `names`."""
    layout, stack = array.layout, len(array.stack)
    own = [None] * (len(shape) - stack)
    for place, (axis, length) in enumerate(zip((layout.in_axis, layout.out_axis), layout.grid, strict=True)):
        if axis is not None and 1 < shape[stack + place] == length == layout.shape[axis]:
            own[place] = names[stack + axis]
    return (*names[:stack], *own)
