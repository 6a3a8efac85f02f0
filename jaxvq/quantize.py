"""The main job: a tree of parameters to a tree with quantized leaves, and back."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from jaxvq._numerics import as_storage, from_storage
from jaxvq._pytree import path_key
from jaxvq.array import QuantizedArray, is_quantized
from jaxvq.methods import AbstractMethod
from jaxvq.spec import Plan, PlanEntry, Rule, Spec, resolve
from jaxvq.stats import LayerStats

Progress = Callable[[Sequence[PlanEntry]], Iterable[PlanEntry]]


def quantize_params(
    params: Any,
    spec: Spec | Rule | Sequence[Rule] | AbstractMethod,
    *,
    key: Array,
    stats: Mapping[str, LayerStats] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Quantizes the weights of a tree.

    Works on any pytree of arrays: Flax linen and nnx, Equinox, plain dictionaries. The same key, params and spec give
    the same codes, under `jax.jit` or not; what happens to a leaf does not depend on the others.

    Args:
      params: a tree of arrays.
      spec: a `Spec`, a sequence of `Rule`s, or a bare method for every weight of rank 2 or more.
      key: random key (`jax.random.key(0)`), for the methods that start from random points.
      stats: the importance of each value, by path; the methods that cluster weigh their errors by it.
      progress: wraps the entries of the plan while they are worked off, such as `rich.progress.track`.

    Returns:
      The same tree, in which the leaves that the spec names are `QuantizedArray`s.

    Raises:
      ValueError: for NaN or Inf in a weight (not seen under `jax.jit`), a rule that matches nothing, a `k` above the
        number of vectors, statistics that fit no leaf.
      TypeError: for a leaf under a rule that is not a float array, a `key` that is none, and statistics that are not
        `LayerStats` by path.

    Example:
      >>> import jaxvq
      >>> params = {"Dense_0": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
      >>> quantized = jaxvq.quantize_params(params, jaxvq.KMeans(bits=4), key=jax.random.key(0))
      >>> quantized["Dense_0"]["kernel"].bits_per_weight
      4.25
    """
    check_key(key)
    plan = resolve(params, spec)
    stats = {} if stats is None else stats
    _check_stats(stats, plan)
    leaves, structure = jax.tree.flatten(params, is_leaf=is_quantized)
    weights = dict(zip((entry.path for entry in plan.entries), leaves, strict=True))
    todo = [entry for entry in plan.entries if entry.method is not None]
    for entry in todo if progress is None else progress(todo):
        importance = stats[entry.path].importance if entry.path in stats else None
        weights[entry.path] = quantize_leaf(weights[entry.path], entry, key=key, weights=importance)
    return jax.tree.unflatten(structure, [weights[entry.path] for entry in plan.entries])


def quantize_leaf(
    weight: Shaped[Any, "..."], entry: PlanEntry, *, key: Array, weights: Float[Array, "..."] | None = None
) -> QuantizedArray:
    """Quantizes one leaf as its plan entry says.

    Args:
      weight: the leaf.
      entry: of `resolve`, with a method.
      key: the key of the whole tree; the leaf's own follows from its path.
      weights: the importance of each value, in the leaf's shape.

    Raises:
      ValueError: for NaN or Inf in the weight or the importance, or negative importance.
    """
    method, layout = entry.method, entry.layout
    if method is None or layout is None:
        raise ValueError(f"{entry.path}: `entry` must have a method, got one that stays float")
    weight = jnp.asarray(weight)
    check_finite(weight, f"{entry.path}: the weight")
    if weights is not None:
        check_finite(weights, f"{entry.path}: the importance")
        _check_not_negative(weights, entry.path)
    own_key = path_key(key, entry.path)
    stack = entry.shape[: entry.stacked]
    return over_stack(
        lambda one, mass, one_key: method.fit(one, layout, key=one_key, weights=mass),
        stack,
        weight,
        weights,
        stack_keys(own_key, stack),
    )


def stack_keys(key: Array, stack: tuple[int, ...]) -> Array:
    """A key for each of stacked layers, or `key` itself for a single one."""
    if not stack:
        return key
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(math.prod(stack)))
    return keys.reshape(*stack, *keys.shape[1:])


def over_stack(function: Callable[..., Any], stack: tuple[int, ...], *trees: Any) -> Any:
    """`function` of each slice of trees whose arrays begin with the axes `stack`, and the results stacked again.

    One after the other, because all layers at once would take the memory of all.
    """
    if not stack:
        return function(*trees)
    results = [
        function(*jax.tree.map(lambda leaf: leaf[index], trees))  # noqa: B023, called before the next index
        for index in np.ndindex(stack)
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*stack, *parts[0].shape), *results)


def dequantize_params(params: Any) -> Any:
    """The tree with every quantized leaf as an array again; differentiable in the decoders, and works under jit.

    Example:
      >>> import jaxvq
      >>> quantized = jaxvq.quantize_params({"w": jnp.ones((64, 32))}, jaxvq.KMeans(bits=1), key=jax.random.key(0))
      >>> dequantize_params(quantized)["w"].shape
      (64, 32)
    """
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


def check_finite(values: Shaped[Array, "..."], name: str) -> None:
    """Raises ValueError for NaN or Inf, with their count. Traced values have none to look at and pass."""
    if isinstance(values, jax.core.Tracer):
        return
    wrong = int(_not_finite(jnp.asarray(values)))
    if wrong:
        raise ValueError(
            f"{name} must be finite, got {wrong} NaN or Inf among {values.size} values; "
            "repair the checkpoint or keep this weight float"
        )


def check_key(key: Any) -> None:
    """Raises TypeError unless `key` is a random key, ValueError if it is several. Traced keys and old ones pass."""
    is_array = isinstance(key, jax.Array | np.ndarray)
    is_new = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_old = is_array and key.dtype == np.uint32 and key.ndim > 0
    if not (is_new or is_old):
        raise TypeError(f"`key` must be a random key, got {key!r}; use jax.random.key(0)")
    if batch := key.shape if is_new else key.shape[:-1]:
        raise ValueError(f"`key` must be one random key, got a batch of shape {batch}; use jax.random.key(0)")


def _check_not_negative(importance: Shaped[Array, "..."], path: str) -> None:
    if isinstance(importance, jax.core.Tracer):
        return
    smallest = float(jnp.min(importance))
    if smallest < 0:
        raise ValueError(
            f"{path}: the importance must not be negative, got {smallest:g}; add squares, such as gradient**2"
        )


@jax.jit
def _not_finite(values: Shaped[Array, "..."]) -> Integer[Array, ""]:
    """How many values are NaN or Inf, counted piece by piece: a flag for every value would take memory like them."""
    flat = as_storage(values).reshape(-1)
    piece = min(flat.size, 2**20)

    def add(step: Array, count: Array) -> Array:
        start = jnp.minimum(step * piece, flat.size - piece)
        part = from_storage(jax.lax.dynamic_slice_in_dim(flat, start, piece), values.dtype)
        new = start + jnp.arange(piece) >= step * piece
        return count + jnp.sum(new & ~jnp.isfinite(part), dtype=jnp.int32)

    return jax.lax.fori_loop(0, -(-flat.size // piece), add, jnp.int32(0))


def _check_stats(stats: Any, plan: Plan) -> None:
    if not isinstance(stats, Mapping):
        raise TypeError(f"`stats` must map paths to LayerStats, got {type(stats).__name__}; use a dictionary")
    entries = {entry.path: entry for entry in plan.entries}
    for path, layer in stats.items():
        if path not in entries:
            raise ValueError(
                f"{path}: `stats` must name leaves of `params`, got this path; it has {', '.join(entries)}"
            )
        entry = entries[path]
        if not isinstance(layer, LayerStats):
            raise TypeError(
                f"{path}: `stats` must hold LayerStats, got {type(layer).__name__}; "
                "use LayerStats.zeros(weight.shape).add(importance)"
            )
        if entry.method is None:
            kept = "stays float" if entry.template is None else "is quantized already"
            raise ValueError(
                f"{path}: `stats` must name leaves that the spec quantizes, got one that {kept}; leave this path out"
            )
        if tuple(np.shape(layer.total)) != entry.shape:
            raise ValueError(
                f"{path}: `stats` must have the weight's shape {entry.shape}, got {np.shape(layer.total)}; "
                "start from LayerStats.zeros(weight.shape)"
            )
        if not isinstance(layer.count, jax.core.Tracer) and float(layer.count) == 0:
            raise ValueError(
                f"{path}: `stats` must have seen something, got LayerStats to which nothing was added; call .add"
            )
