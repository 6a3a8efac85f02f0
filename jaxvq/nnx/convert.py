"""Whole models: quantized, trained, stored and back, in place."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array

from jaxvq._pytree import path_key, path_str
from jaxvq.array import is_quantized
from jaxvq.methods import AbstractMethod
from jaxvq.nnx.layers import Layer, adopt, out_axis, release, round_inputs, weight_rank
from jaxvq.nnx.weights import Latent, Quantized, Weight, annotations_of
from jaxvq.quantize import Progress, check_finite, check_key, quantize_params
from jaxvq.spec import Rule, Spec, as_spec, resolve
from jaxvq.stats import LayerStats
from jaxvq.training import AbstractTraining, check_layer

REBUILD = "build the model as it was when the tree was made"
TRANSIENT = (nnx.RngState, nnx.Intermediate, nnx.Cache)


def quantize_model(
    model: Any,
    spec: Spec | Rule | Sequence[Rule] | AbstractMethod,
    *,
    key: Array,
    training: AbstractTraining | None = None,
    act_bits: int | None = None,
    act_momentum: float | None = None,
    stats: Mapping[str, LayerStats] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Quantizes the weights of a model, in place.

    Flax's Linear, Conv, ConvTranspose and Embed become those of `jaxvq.nnx` and keep all else that they have; other
    modules get the quantized weight and stay what they are. Shared weights stay shared, and what is quantized already
    is left alone. Make the optimizer afterwards: the parameters are others.

    Paths are those of `params_of`, such as `"layers/0/kernel"`. A bare method, and the default of a spec, leaves
    parameters called `bias` or `scale` float, and those of a type of their own, such as `nnx.LoRAParam`; rules can
    name them. The stacked axes of Flax's own linear layers (of `nnx.vmap`, for `nnx.scan`) are seen by their shapes;
    other modules need `Rule(..., stacked=1)`. With sharding annotations, call it in the context of the mesh.

    Args:
      model: an `nnx.Module`.
      spec: as for `jaxvq.quantize_params`, whose codes these are for the same key and paths.
      key: random key.
      training: keeps the weights float while they train, in this way; `harden_model` makes codes of them.
      act_bits: rounds the inputs of the converted layers to so many bits; see `Linear`.
      act_momentum: of the range of these inputs; see `Linear`.
      stats: the importance of each value, by path; not with `training`.
      progress: wraps the entries of the plan while they are worked off, such as `rich.progress.track`.

    Returns:
      The model that was given, whose new parts are in training mode (`model.eval()` ends it).

    Raises:
      ValueError: as `jaxvq.quantize_params`, and for arguments that do not go together. The model is as it was.
      TypeError: as `jaxvq.quantize_params`, and for a model that is none.

    Example:
      >>> import jaxvq
      >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu)
      >>> quantize_model(model, jaxvq.KMeans(bits=4), key=jax.random.key(0))(jnp.ones((1, 64))).shape
      (1, 32)
    """
    check_key(key)
    check_layer(None, None, act_bits, act_momentum)
    if training is not None and not isinstance(training, AbstractTraining):
        raise TypeError(f"`training` must be a way to train such as StraightThrough() or None, got {training!r}")
    if training is not None and stats is not None:
        raise ValueError("`stats` must be None with `training`, which keeps weights float; use one of the two")
    held = {path: one for path, one in _held(model).items() if isinstance(one.node, nnx.Param | Weight)}
    tree, spec = _tree(held), _for_layers(as_spec(spec), held)
    new: dict[int, Any] = {}
    if training is None:
        for path, leaf in _by_path(quantize_params(tree, spec, key=key, stats=stats, progress=progress)).items():
            if is_quantized(leaf) and not isinstance(held[path].node, Weight):
                new[id(held[path].node)] = Quantized(leaf, annotations_of(held[path].node))
    else:
        entries = [entry for entry in resolve(tree, spec).entries if entry.method is not None]
        for entry in entries if progress is None else progress(entries):
            new[id(held[entry.path].node)] = _latent(held[entry.path].node, entry, training, key)
    for owner in _replace(model, new):
        if act_bits is not None and isinstance(owner, Layer):
            round_inputs(owner, act_bits, act_momentum)
    return model


def harden_model(model: Any, *, key: Array) -> Any:
    """Makes codes of the weights that were trained for it (`training=`), in place.

    Args:
      model: an `nnx.Module`.
      key: random key, for the codebooks of `QuantNoise`, which are found now.

    Returns:
      The model that was given. Its weights are what they were after `model.eval()`, but for those codebooks.

    Raises:
      ValueError: for NaN or Inf in a weight. The model is as it was.

    Example:
      >>> import jaxvq
      >>> method, training = jaxvq.KMeans(bits=4), jaxvq.SoftAssignment()
      >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu)
      >>> model = quantize_model(model, method, training=training, key=jax.random.key(0))
      >>> harden_model(model, key=jax.random.key(1)).layers[0].kernel.array.bits_per_weight
      4.25
    """
    check_key(key)
    new: dict[int, Any] = {}
    for path, one in _held(model).items():
        if isinstance(one.node, Latent):
            check_finite(one.node.weight.get_value(), f"{path}: the weight")
            new[id(one.node)] = Quantized(one.node.harden(path_key(key, path)), annotations_of(one.node))
    _replace(model, new)
    return model


def dequantize_model(model: Any) -> Any:
    """Makes a float model of a quantized one, in place: of Flax's own layers and `nnx.Param`s.

    Weights in training (`training=`) become the float parameters that they are; `harden_model` rounds them first.
    Inputs are no longer rounded.

    Returns:
      The model that was given.

    Example:
      >>> import jaxvq
      >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu)
      >>> model = dequantize_model(quantize_model(model, jaxvq.KMeans(bits=4), key=jax.random.key(0)))
      >>> type(model.layers[0]) is nnx.Linear
      True
    """
    new: dict[int, Any] = {}
    for node in (one.node for one in _held(model).values()):
        if isinstance(node, Latent):
            new[id(node)] = node.weight
        elif isinstance(node, Quantized):
            new[id(node)] = nnx.Param(node.get_value(), **annotations_of(node))
    _replace(model, new)
    for layer in [node for _, node in nnx.iter_graph(model) if isinstance(node, Layer)]:
        release(layer)
    return model


def params_of(model: Any) -> dict[Any, Any]:
    """Everything in a model that a file must hold, as a plain tree: for `jaxvq.save`, `jaxvq.report` and the like.

    Returns:
      Nested dictionaries by attribute name, with a `QuantizedArray` for each quantized weight and an array for each
      other variable (parameters, batch statistics, ranges of inputs), but no random keys, caches and intermediate
      values. What is shared is there once, where it comes first.

    Example:
      >>> params_of(nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0)))["kernel"].shape
      (64, 32)
    """
    return _tree(_held(model, whole=lambda _, weight: isinstance(weight, Quantized)))


def load_params(model: Any, params: Any) -> Any:
    """Puts parameters into a model, in place: what `params_of` or `jaxvq.load` returned.

    The model may be float, as it was first made, or quantized in any way: it gets a quantized weight where the tree
    has one, and floats where the tree has an array.

    Args:
      model: an `nnx.Module` of the structure that `params` came from.
      params: the tree.

    Returns:
      The model that was given.

    Raises:
      ValueError: for a leaf that the model or `params` lacks, and one of another shape or dtype. The model is as it
        was.
      TypeError: for a leaf that is no array.

    Example:
      >>> import jaxvq
      >>> model, other = (nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(seed)), nnx.relu) for seed in (0, 1))
      >>> quantize_model(other, jaxvq.KMeans(bits=4), key=jax.random.key(0)) is other
      True
      >>> load_params(model, params_of(other)).layers[0].kernel.array.bits_per_weight
      4.25
    """
    leaves = _by_path(params)
    held = _held(model, whole=lambda path, weight: isinstance(weight, Quantized) or path in leaves)
    if lacking := [path for path in held if path not in leaves]:
        raise ValueError(
            f"{lacking[0]}: `params` must have every leaf of the model, got none here ({len(lacking)} are missing); "
            "save all that params_of(model) returns"
        )
    for path, leaf in leaves.items():
        if path not in held:
            raise ValueError(f"{path}: `params` must have leaves of the model alone, which has none here; {REBUILD}")
        _check_fits(path, held[path], leaf)
    new: dict[int, Any] = {}
    for path, leaf in leaves.items():
        node = held[path].node
        if is_quantized(leaf):
            new[id(node)] = Quantized(leaf, annotations_of(node))
        elif isinstance(node, Quantized):
            new[id(node)] = nnx.Param(jnp.asarray(leaf), **annotations_of(node))
    _replace(model, new)
    for path, leaf in leaves.items():
        node = held[path].node
        if isinstance(node, Latent) and id(node) not in new:
            node.weight.set_value(jnp.asarray(leaf))
            node.restart()
        elif id(node) not in new:
            node.set_value(jnp.asarray(leaf))
    return model


@dataclasses.dataclass(frozen=True)
class _Held:
    """A variable or a whole weight of a model.

    Attributes:
      keys: where it first is.
      owner: what holds it there.
      node: itself.
    """

    keys: tuple[Any, ...]
    owner: Any
    node: Any


def _held(model: Any, whole: Callable[[str, Weight], bool] = lambda _path, _weight: True) -> dict[str, _Held]:
    """The variables of a model by path, each once; those of a weight that is `whole` count as one."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an nnx.Module, got {type(model).__name__}; trees go through jaxvq.quantize_params"
        )
    nodes = dict(nnx.iter_graph(model))
    paths = {keys: "/".join(map(str, keys)) for keys in nodes}
    wholes = {keys for keys, node in nodes.items() if isinstance(node, Weight) and whole(paths[keys], node)}
    found: dict[str, _Held] = {}
    for keys, node in nodes.items():
        variable = isinstance(node, nnx.Variable) and not isinstance(node, TRANSIENT)
        if not keys or not (variable or keys in wholes) or any(keys[:depth] in wholes for depth in range(len(keys))):
            continue
        if paths[keys] in found:
            raise ValueError(f"{paths[keys]}: two variables have this path; rename one, so that it tells them apart")
        found[paths[keys]] = _Held(keys, nodes[keys[:-1]], node)
    return found


def _tree(held: Mapping[str, _Held]) -> dict[Any, Any]:
    return traverse_util.unflatten_dict({one.keys: _array_of(one.node) for one in held.values()})


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_str(path): leaf for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_quantized)}


def _array_of(node: Any) -> Any:
    if isinstance(node, Quantized):
        return node.array
    return (node.weight if isinstance(node, Latent) else node).get_value()


def _replace(model: Any, new: Mapping[int, Any]) -> list[Any]:
    """Puts new nodes wherever the old ones are, which are given by `id`; returns what they are in."""
    edges = []
    for keys, node in nnx.iter_graph(model):
        children = _children(node)
        edges += [(node, name, new[id(child)]) for name, child in children.items() if id(child) in new]
        if isinstance(node, tuple) and any(id(child) in new for child in node):
            raise ValueError(
                f"{'/'.join(map(str, keys))}: a weight must be in a module, list or dictionary to be replaced, "
                "got a tuple; use nnx.List"
            )
    for node, name, child in edges:
        if isinstance(node, nnx.Pytree):
            setattr(node, name, child)
        else:
            node[name] = child
        adopt(node)
    return [node for node, _, _ in edges]


def _children(node: Any) -> dict[Any, Any]:
    """What a node holds that can be replaced, by name."""
    if isinstance(node, nnx.Pytree):
        return vars(node)
    if isinstance(node, dict | list):
        return dict(node.items() if isinstance(node, dict) else enumerate(node))
    return {}


def _latent(param: nnx.Param, entry: Any, training: AbstractTraining, key: Array) -> Latent:
    """The parameter, to be trained for what the plan says."""
    check_finite(param.get_value(), f"{entry.path}: the weight")
    try:
        training.check(entry.method)
    except ValueError as error:
        raise ValueError(f"{entry.path}: {error}") from None
    return Latent(param, entry.method, training, entry.layout, key=path_key(key, entry.path))


def _for_layers(spec: Spec, held: Mapping[str, _Held]) -> Spec:
    """The spec, with rules in front for the weights of which the model says more than the path does."""
    rules = []
    for path, one in held.items():
        pattern = re.escape(path)
        rule = next((rule for rule in spec.rules if re.fullmatch(rule.pattern, path)), None)
        special = one.keys[-1] in ("bias", "scale") or type(one.node) is not nnx.Param
        if isinstance(one.node, Latent) or (rule is None and special):
            rules.append(Rule(pattern, None))
            continue
        rule = rule or Rule(pattern, spec.default)
        rank = weight_rank(one.owner, one.keys[-1])
        if rule.method is None or rank is None:
            continue
        stacked = rule.stacked or max(0, one.node.ndim - rank)
        axis = spec.out_axis if rule.out_axis is None else rule.out_axis
        axis = out_axis(one.owner) if axis is None else axis
        rules.append(dataclasses.replace(rule, pattern=pattern, stacked=stacked, out_axis=axis))
    return dataclasses.replace(spec, rules=(*rules, *spec.rules))


def _check_fits(path: str, held: _Held, leaf: Any) -> None:
    """Refuses a leaf that the model cannot have in this place."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"{path}: `params` must hold arrays, got {type(leaf).__name__}; pass what params_of returned")
    there = _array_of(held.node)
    there = there if hasattr(there, "dtype") else jnp.asarray(there)
    want, got = (tuple(there.shape), jnp.dtype(there.dtype)), (tuple(leaf.shape), leaf.dtype)
    if want != got:
        raise ValueError(f"{path}: `params` must have {want[1]} {want[0]} here, got {got[1]} {got[0]}; {REBUILD}")
    if not is_quantized(leaf):
        return
    if not isinstance(held.node, nnx.Param | Weight):
        raise ValueError(f"{path}: `params` must have an array here, got a quantized weight; {REBUILD}")
    rank = weight_rank(held.owner, held.keys[-1])
    if rank is not None and len(leaf.layout.shape) != rank:
        raise ValueError(
            f"{path}: `params` must have a weight quantized slice by slice here, in slices of {rank} axes, got slices "
            f"of shape {leaf.layout.shape}; quantize it by Rule(..., stacked={len(leaf.shape) - rank})"
        )
