"""Quantized weights in the variables of a model, whichever layers it is made of."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from flax.core import meta
from jaxtyping import Array

from jaxvq._pytree import key_name, path_key, path_str, pytree_dataclass, static
from jaxvq.array import QuantizedArray, combine, is_quantized, partition
from jaxvq.layout import Layout
from jaxvq.methods import AbstractMethod
from jaxvq.quantize import check_finite, check_key, dequantize_params
from jaxvq.training import AbstractTraining, harden_layers


def to_variables(params: Any) -> dict[str, Any]:
    """Collections for a tree with quantized weights: "params" with what trains of them, "codes" with the rest.

    Args:
      params: from `quantize_params` or `load`. Where a `nn.Partitioned` box is around a quantized weight, its names go
        to the axes of the weight's parts that are as long as the weight's own.

    Example:
      >>> import jaxvq
      >>> model, inputs = nn.Dense(8), jax.numpy.ones((1, 32))
      >>> params = model.init(jax.random.key(0), inputs)["params"]
      >>> params = jaxvq.quantize_params(params, jaxvq.KMeans(bits=2), key=jax.random.key(1))
      >>> apply(model, to_variables(params), inputs).shape
      (1, 8)
    """
    codes = {}

    def split(path: Sequence[Any], leaf: Any) -> Any:
        array = leaf.value if isinstance(leaf, meta.Partitioned) else leaf
        if not is_quantized(array):
            return leaf
        trainable, frozen = (with_names(half, leaf, array.layout, len(array.stack)) for half in partition(array))
        codes[tuple(key_name(step) for step in path)] = frozen
        return trainable

    halves = jax.tree.map_with_path(split, params, is_leaf=lambda x: is_quantized(x) or meta.is_axis_metadata(x))
    return {"params": halves, "codes": traverse_util.unflatten_dict(codes)}


def from_variables(variables: Mapping[str, Any]) -> Any:
    """The parameters with whole `QuantizedArray`s and without boxes, as for `jaxvq.save` and `jaxvq.report`.

    Raises:
      ValueError: for half a weight.

    Example:
      >>> from jaxvq import KMeans, linen
      >>> variables = linen.Dense(8, method=KMeans(bits=2)).init(jax.random.key(0), jax.numpy.ones((1, 32)))
      >>> from_variables(variables)["kernel"].bits_per_weight
      2.5
    """
    return meta.unbox(_unjoined(join(variables)["params"]))


def join(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with whole weights in "params", as `model.apply` and `model.bind` of unmodified models take them.

    Each quantized weight is in a box of the kind that Flax opens when a module asks for a parameter
    (`flax.core.meta.AxisMetadata`): there, and so also inside `scan`, `vmap`, `remat` and `jit`, it is decoded.

    Raises:
      ValueError: for half a weight.

    Example:
      >>> from jaxvq import KMeans, linen
      >>> variables = linen.Dense(8, method=KMeans(bits=2)).init(jax.random.key(0), jax.numpy.ones((1, 32)))
      >>> nn.Dense(8).bind(join(variables))(jax.numpy.ones((1, 32))).shape
      (1, 8)
    """
    codes = {"/".join(path): half for path, half in traverse_util.flatten_dict(variables.get("codes", {})).items()}

    def whole(path: Sequence[Any], leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        half = codes.pop(path_str(path), None)
        is_half = leaf.codes.words is None
        return Whole(join_halves(path_str(path), leaf, half) if is_half else meta.unbox(leaf))

    params = jax.tree.map_with_path(whole, variables.get("params", {}), is_leaf=is_quantized)
    if codes:
        raise ValueError(
            f'{next(iter(codes))}: "params" must have the other half of the weight whose codes are here, got none; '
            "pass the two collections that belong together"
        )
    return {name: tree for name, tree in variables.items() if name != "codes"} | {"params": params}


def apply(model: nn.Module, variables: Mapping[str, Any], /, *args: Any, **kwargs: Any) -> Any:
    """`model.apply` on variables with quantized weights, for any model.

    Only wrappers that compute with the whole tree of parameters, such as `nn.WeightNorm`, need `dequantize` instead.
    Its gradient with respect to `variables["params"]` is that of codebooks and scales. For a `TrainState`,
    `functools.partial(jaxvq.linen.apply, model)` is the `apply_fn`.

    Args:
      model: any module, of Flax's layers or those of this module.
      variables: "params" and "codes" as from `to_variables`, and what else the model has.
      *args: of the model.
      **kwargs: of the model and of `model.apply`, such as `mutable`, `rngs` and `method`.

    Returns:
      What `model.apply` returns; with "params" mutable, "codes" are returned too.

    Raises:
      ValueError: for half a weight.

    Example:
      >>> from jaxvq import KMeans, linen
      >>> variables = linen.Dense(8, method=KMeans(bits=2)).init(jax.random.key(0), jax.numpy.ones((1, 32)))
      >>> def loss(params):
      ...     return apply(nn.Dense(8), {**variables, "params": params}, jax.numpy.ones((1, 32))).sum()
      >>> jax.grad(loss)(variables["params"])["kernel"].decoder.vectors.shape
      (1, 1, 1, 4, 1)
    """
    found = model.apply(join(variables), *args, **kwargs)
    if kwargs.get("mutable", False) is False or "params" not in found[1]:
        return found
    return found[0], {**found[1], **to_variables(_unjoined(found[1]["params"]))}


def dequantize(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the unmodified Flax model: quantized weights as arrays, no codes.

    Example:
      >>> from jaxvq import KMeans, linen
      >>> variables = linen.Dense(8, method=KMeans(bits=2)).init(jax.random.key(0), jax.numpy.ones((1, 32)))
      >>> dequantize(variables)["params"]["kernel"].shape
      (32, 8)
    """
    rest = {name: tree for name, tree in variables.items() if name != "codes"}
    return rest | {"params": dequantize_params(from_variables(variables))}


def harden(model: nn.Module, variables: Mapping[str, Any], /, *args: Any, key: Array, **kwargs: Any) -> Any:
    """The parameters with every weight quantized as its layer says, for `jaxvq.save` when training is over.

    Latent weights become codes and lose what was learned beside them, the halves of quantized weights are joined, and
    everything else stays. The model runs once to ask its layers; those that do not run stay as they are.

    Args:
      model: with layers of this module, stacked by `nn.scan` and `nn.vmap` or not.
      variables: all that the model has.
      *args: of the model; a small batch will do.
      key: random key, for methods that start from random points.
      **kwargs: of the model and of `model.apply`.

    Raises:
      ValueError: for NaN or Inf in a weight, or half a weight.

    Example:
      >>> from jaxvq import StraightThrough, Symmetric, linen
      >>> layer, inputs = linen.Dense(8, method=Symmetric(bits=4), training=StraightThrough()), jax.numpy.ones((1, 32))
      >>> variables = layer.init(jax.random.key(0), inputs)
      >>> harden(layer, variables, inputs, key=jax.random.key(1))["kernel"].codes.bits
      4
    """
    check_key(key)
    plain = meta.unbox(variables["params"])
    boxed = jax.tree.map(lambda leaf: leaf if is_quantized(leaf) else Latent(leaf), plain, is_leaf=is_quantized)
    joined = join({**variables, "params": boxed})
    # Jitted, so that what the model computes beside its parameters is left out.
    _, updates = jax.jit(lambda found: model.apply(found, *args, mutable=["params"], **kwargs))(joined)
    boxes: dict[Any, Any] = traverse_util.flatten_dict(updates["params"])
    latents = {path: box for path, box in boxes.items() if isinstance(box, Latent)}
    learned = {(*path[:-1], f"{path[-1]}_{part}") for path, box in latents.items() for part in box.learned}
    params = traverse_util.unflatten_dict({path: box for path, box in boxes.items() if path not in learned})

    def hardened(path: Sequence[Any], box: Whole | Latent) -> Any:
        return box.array if isinstance(box, Whole) else box.harden(path_str(path), key)

    return jax.tree.map_with_path(hardened, params, is_leaf=meta.is_axis_metadata)


class Box(meta.AxisMetadata):
    """A parameter that modules which know no better see as an array: Flax opens it when they ask for it."""

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: Any) -> Any:
        """Told by `nn.scan` and `nn.vmap` where the axis that stacks layers is."""
        del params
        if index != 0:
            raise ValueError(
                f'quantized weights must be stacked along axis 0, got {index}; use variable_axes={{"params": 0, ...}}'
            )
        return self

    def remove_axis(self, index: int, params: Any) -> Any:
        return self.add_axis(index, params)


@pytree_dataclass
class Whole(Box):
    """A quantized weight."""

    array: QuantizedArray

    def unbox(self) -> Array:
        return self.array.dequantize()


@pytree_dataclass
class Latent(Box):
    """A parameter on its way through `harden`. If it is a latent weight, its layer adds what is known about it.

    Attributes:
      weight: the parameter.
      learned: what trains beside it.
      state: what is remembered beside it.
      recipe: how it trains, how it is to be quantized, and the layout of one layer.
    """

    weight: Array
    learned: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    state: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    recipe: tuple[AbstractTraining, AbstractMethod, Layout] | None = static(default=None)

    def unbox(self) -> Array:
        return self.weight

    def harden(self, path: str, key: Array) -> Any:
        """What it becomes, each of stacked layers by itself."""
        if self.recipe is None:
            return self.weight
        training, method, layout = self.recipe
        check_finite(self.weight, f"{path}: the weight")
        extra = dict(self.learned), dict(self.state)
        return harden_layers(training, self.weight, extra, method, layout, key=path_key(key, path))


def join_halves(path: str, trainable: Any, frozen: Any) -> QuantizedArray:
    """The weight whose halves these are, in boxes or not."""
    if not is_quantized(trainable):
        raise ValueError(
            f"{path}: the weight of a layer with `method` and without `training` must be quantized, got a float one; "
            "pass what jaxvq.linen.to_variables(jaxvq.quantize_params(...)) returns"
        )
    if not is_quantized(frozen):
        raise ValueError(
            f'{path}: "codes" must have the codes of the weight, got none; pass both collections, and list "codes" in '
            'nn.scan and nn.vmap where they list "params"'
        )
    try:
        return combine(meta.unbox(trainable), meta.unbox(frozen))
    except ValueError:
        raise ValueError(
            f'{path}: "params" and "codes" must have the halves of one weight, got those of two; '
            "pass the two collections that belong together"
        ) from None


def with_names(parts: Any, box: Any, layout: Layout, stack: int = 0) -> Any:
    """Arrays `[*stack, #g, #out, ...]` with the axis names that the weight's box has, where they are as long."""
    if not isinstance(box, meta.Partitioned):
        return parts
    names = (*box.names, *[None] * (stack + len(layout.shape)))
    sides = [None if axis is None else names[stack + axis] for axis in (layout.in_axis, layout.out_axis)]

    def named(leaf: Array) -> Any:
        lengths = zip(leaf.shape[stack:], layout.grid, sides, strict=False)
        own = [name if 1 < length == whole else None for length, whole, name in lengths]
        return box.replace(value=leaf, names=(*names[:stack], *own, *[None] * (leaf.ndim - stack - 2)))

    return jax.tree.map(named, parts)


def _unjoined(params: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.array if isinstance(leaf, Whole) else leaf, params, is_leaf=meta.is_axis_metadata
    )
