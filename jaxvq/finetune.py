"""What fine-tuning of quantized weights needs beside an optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvq import _fit
from jaxvq._pytree import path_str
from jaxvq.array import QuantizedArray, is_quantized
from jaxvq.methods import AbstractMethod
from jaxvq.quantize import Progress, check_finite, check_key, over_stack, quantize_leaf
from jaxvq.spec import Plan, Rule, Spec, resolve


def reassign(params: Any, targets: Any) -> Any:
    """Gives each quantized weight the codes that are nearest to a target, under the codebook that it has now.

    While codebooks train, codes stay; called every so many steps, with the weights before quantization for targets,
    this lets weights move to the centroid that has come closer.

    Args:
      params: a tree with quantized weights.
      targets: the same tree with floats in their places; its other leaves are ignored.

    Returns:
      `params` with new codes. Shapes stay as they are, so nothing compiles again.

    Raises:
      ValueError: for a quantized weight without a target of its shape, or NaN or Inf in it.

    Example:
      >>> import jaxvq
      >>> weights = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> quantized = jaxvq.quantize_params(weights, jaxvq.KMeans(bits=4), key=jax.random.key(1))
      >>> bool((reassign(quantized, weights)["w"].unpack() == quantized["w"].unpack()).all())
      True
    """
    by_path = {path_str(path): leaf for path, leaf in jax.tree.leaves_with_path(targets, is_leaf=is_quantized)}

    def encode(path: Sequence[Any], leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        name = path_str(path)
        target = by_path.get(name)
        if target is None or is_quantized(target) or jnp.shape(target) != leaf.shape:
            got = "none" if target is None else "a quantized one" if is_quantized(target) else str(jnp.shape(target))
            raise ValueError(
                f"{name}: `targets` must have a float array of shape {leaf.shape}, got {got}; "
                "pass the tree from before it was quantized"
            )
        check_finite(target, f"{name}: the target")

        def nearest(array: QuantizedArray, weight: Float[Array, "..."]) -> QuantizedArray:
            return _fit.encode(weight, None, array.decoder, layout=array.layout, bits=array.codes.bits)

        return over_stack(nearest, leaf.stack, leaf, jnp.asarray(target))

    return jax.tree.map_with_path(encode, params, is_leaf=is_quantized)


def quantize_iteratively(
    params: Any,
    spec: Spec | Rule | Sequence[Rule] | AbstractMethod,
    finetune: Callable[[Any, str], Any],
    *,
    key: Array,
    progress: Progress | None = None,
) -> Any:
    """Quantizes one weight, has the others trained to make up for it, then quantizes the next.

    Args:
      params: a tree of arrays.
      spec: as for `quantize_params`.
      finetune: `finetune(params, path) -> params`, called after the weight at `path` was quantized. It trains what
        `jaxvq.partition` says can train: the weights that are still float, and the codebooks so far.
      key: random key; the codes of the first weight are those of `quantize_params`.
      progress: wraps the entries of the plan while they are worked off, such as `rich.progress.track`.

    Returns:
      The same tree, in which the leaves that the spec names are `QuantizedArray`s.

    Raises:
      ValueError: like `quantize_params`, or when `finetune` returns another tree.

    Source: Stock et al., "And the Bit Goes Down: Revisiting the Quantization of Neural Networks", 2020, arXiv
    1907.05686.

    Example:
      >>> import jaxvq
      >>> params = {"a": jnp.ones((64, 32)), "b": jnp.ones((32, 8))}
      >>> def finetune(params, path):
      ...     return params  # a few epochs with optax
      >>> done = quantize_iteratively(params, jaxvq.KMeans(bits=2), finetune, key=jax.random.key(0))
      >>> done["b"].bits_per_weight
      2.5
    """
    check_key(key)
    plan = resolve(params, spec)
    structure = jax.tree.structure(params, is_leaf=is_quantized)
    todo = [index for index, entry in enumerate(plan.entries) if entry.method is not None]
    entries = [plan.entries[index] for index in todo]
    for index, entry in zip(todo, entries if progress is None else progress(entries), strict=True):
        leaves = jax.tree.leaves(params, is_leaf=is_quantized)
        leaves[index] = quantize_leaf(leaves[index], entry, key=key)
        params = finetune(jax.tree.unflatten(structure, leaves), entry.path)
        _check_same(params, structure, entry.path, plan)
    return params


def _check_same(params: Any, structure: Any, path: str, plan: Plan) -> None:
    got = jax.tree.structure(params, is_leaf=is_quantized)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)]
    if got != structure or shapes != [entry.shape for entry in plan.entries]:
        raise ValueError(
            f"{path}: `finetune` must return the tree that it was given, with other values, got {got}; "
            "end it with jaxvq.combine(trainable, frozen)"
        )


def distillation_loss(
    logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "*batch"]:
    """How far the predictions are from those of a teacher, such as the network before it was quantized.

    The cross-entropy between the two softened distributions less the teacher's own entropy (the Kullback-Leibler
    divergence), times `temperature**2`, so that its gradient keeps its size. No gradient reaches the teacher.

    Args:
      logits: of the network that trains.
      teacher_logits: of the teacher.
      temperature: both distributions are softened by it.

    Returns:
      The loss of each example, in nats; 0 where both agree.

    Raises:
      ValueError: for a temperature that is not positive, or shapes that differ.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

    Example:
      >>> float(distillation_loss(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0])))
      0.0
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}; use for example 1.0")
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`teacher_logits` must have the shape {logits.shape} of `logits`, got {teacher_logits.shape}; "
            "give both networks the same batch"
        )
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    student = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
