"""ResNet-20 for CIFAR-10 in Flax, its weights from PyTorch, and how it is fine-tuned, quantized or not."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

import jaxvq
from experiments.cifar import CLASSES, augment
from experiments.data import Dataset
from jaxvq import Codebook, QuantizedArray

EPSILON = 1e-5
MOMENTUM = 0.9
TEMPERATURE = 2.0
FLOOR = 1e-3
INT8_MAX = 127
SENSITIVITY_BATCH = 25

Variables = dict[str, Any]
Progress = Callable[[Sequence[Any]], Iterable[Any]]


class ResNet20(nn.Module):
    """19 convolutions of 3x3 and a dense layer; the shortcuts have no weights.

    Source: K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385,
    section 4.2, with option A where the channels double.

    Attributes:
      widths: channels of the stages, three as published.
      blocks: residual blocks in each stage, of two convolutions each.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 3

    @nn.compact
    def __call__(self, images: Float[Array, "n height width 3"], train: bool) -> Float[Array, "n 10"]:
        x = nn.relu(_normalized(images, self.widths[0], "conv1", "bn1", train=train))
        for stage, width in enumerate(self.widths, start=1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                x = Block(width, stride, name=f"layer{stage}_{block}")(x, train)
        return nn.Dense(CLASSES, name="linear")(jnp.mean(x, axis=(1, 2)))


class Block(nn.Module):
    """Two convolutions beside a shortcut.

    Attributes:
      width: output channels.
      stride: of the first convolution.
    """

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "n height width c"], train: bool) -> Float[Array, "n height2 width2 c2"]:
        y = nn.relu(_normalized(x, self.width, "conv1", "bn1", train=train, stride=self.stride))
        y = _normalized(y, self.width, "conv2", "bn2", train=train)
        more = (self.width - x.shape[-1]) // 2
        shortcut = x[:, :: self.stride, :: self.stride]
        return nn.relu(y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (more, more))))


def _normalized(x: Array, width: int, conv: str, norm: str, *, train: bool, stride: int = 1) -> Array:
    # The padding is that of PyTorch: Flax's own "SAME" would shift a convolution of stride 2 by one pixel.
    x = nn.Conv(width, (3, 3), strides=stride, padding=((1, 1), (1, 1)), use_bias=False, name=conv)(x)
    return nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, name=norm)(x)


def random_variables(model: ResNet20, images: Float[np.ndarray, "n height width 3"]) -> Variables:
    """Positive numbers for all variables, in no time: Flax's own initializers compile for seconds."""
    generator = np.random.default_rng(0)
    shapes: Any = jax.eval_shape(lambda: model.init(jax.random.key(0), images[:1], train=False))
    return jax.tree.map(lambda leaf: jnp.asarray(generator.uniform(0.1, 0.9, leaf.shape), leaf.dtype), dict(shapes))


def from_torch(tensors: Mapping[str, np.ndarray]) -> Variables:
    """The variables of the network, from tensors under their PyTorch names.

    Convolution weights (out, in, height, width) become kernels (height, width, in, out), dense weights (out, in)
    become (in, out); the blocks `layer1.0` are called `layer1_0`.

    Raises:
      ValueError: for a name that the network does not have.
    """
    variables: Variables = {"params": {}, "batch_stats": {}}
    for name, tensor in tensors.items():
        *layers, kind = name.split(".")
        collection, leaf = _place(kind, tensor.ndim)
        layers = [f"{layers[0]}_{layers[1]}", *layers[2:]] if len(layers) > 1 else layers
        node = variables[collection]
        for layer in layers:
            node = node.setdefault(layer, {})
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim, (0,))
        node[leaf] = jnp.asarray(np.ascontiguousarray(tensor.transpose(axes)))
    return variables


def _place(kind: str, rank: int) -> tuple[str, str]:
    """The collection and the name of a leaf."""
    places = {
        "weight": ("params", "scale" if rank == 1 else "kernel"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    }
    if kind not in places:
        raise ValueError(f"`tensors` must have names that end in {', '.join(places)}, got {kind!r}; leave it out")
    return places[kind]


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """How a trained network is trained on.

    Attributes:
      epochs: passes over the training images; parts of one are allowed.
      batch_size: images per step.
      learning_rate: the highest step size of Adam; it falls to zero along a cosine.
      distilled: the share of the teacher in the loss, where there is one; the labels have the rest.
      seed: of the order of the images, their shifts and their mirroring.
      spec: how the weights will be quantized that are float still. A network then takes the same compiled program
        whichever of them are quantized yet; what it learns is the same.
    """

    epochs: float = 6
    batch_size: int = 64
    learning_rate: float = 1e-3
    distilled: float = 0.9
    seed: int = 0
    spec: jaxvq.Spec | None = None


@dataclasses.dataclass(frozen=True)
class _Tuner:
    """What a step needs beside arrays; compared by value, so that its program compiles once for any number of steps."""

    model: ResNet20
    distilled: float

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.scale_by_adam()


def tune(
    model: ResNet20,
    variables: Variables,
    dataset: Dataset,
    config: TuneConfig,
    *,
    teacher: Variables | None = None,
    progress: Progress = iter,
) -> Variables:
    """Trains a network on, quantized or not: all float leaves of its parameters, so its codebooks but not its codes.

    Args:
      model: the network.
      variables: where to start; `params` may hold quantized leaves.
      dataset: only the training part is looked at.
      config: how to train.
      teacher: float variables of the same network, whose answers the training imitates as far as
        `config.distilled` says (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
        arXiv 1503.02531).
      progress: wraps the sequence of steps, such as `rich.progress.track`.

    Raises:
      ValueError: when there are fewer training images than make one batch.
    """
    count = len(dataset.train_images)
    if count < config.batch_size:
        raise ValueError(
            f"`batch_size` must be at most the {count} training images, got {config.batch_size}; use a smaller one"
        )
    steps = max(1, round(config.epochs * (count // config.batch_size)))
    tuner = _Tuner(model, config.distilled)
    rates = np.asarray(jax.jit(optax.cosine_decay_schedule(config.learning_rate, steps))(jnp.arange(steps)))
    params = variables["params"] if config.spec is None else _with_room(variables["params"], config.spec)
    trainable, frozen = jaxvq.partition(jax.tree.map(jnp.copy, params))
    statistics, state = jax.tree.map(jnp.copy, variables["batch_stats"]), tuner.optimizer.init(trainable)
    batches = _batches(dataset, config)
    # One call per step: on CPUs a convolution inside `lax.scan` ran 12 times slower than outside.
    for step in progress(range(steps)):
        rate, batch = rates[step], next(batches)
        trainable, statistics, state = _step(tuner, trainable, statistics, state, frozen, teacher, rate, batch)
    params = _map_places(lambda place: place.after if place.done else place.before, jaxvq.combine(trainable, frozen))
    return {"params": params, "batch_stats": statistics}


@flax.struct.dataclass
class _Place:
    """A weight before and after it is quantized, and whether it is: both have a place in a compiled program."""

    before: Float[Array, "..."]
    after: QuantizedArray
    done: Bool[Array, ""]


def _with_room(params: Any, spec: jaxvq.Spec) -> Any:
    """The parameters with a `_Place` for each weight that `spec` names; zeros for what is not there yet or no more."""
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    for index, entry in enumerate(jaxvq.resolve(structure.unflatten(shapes), spec).entries):
        if entry.template is not None:
            done = isinstance(leaves[index], QuantizedArray)
            missing = shapes[index] if done else entry.template
            zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), missing)
            before, after = (zeros, leaves[index]) if done else (leaves[index], zeros)
            leaves[index] = _Place(before, after, jnp.array(done))
    return structure.unflatten(leaves)


def _map_places(function: Callable[[_Place], Any], params: Any) -> Any:
    def one(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, _Place) else leaf

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, _Place))


def _decoded(params: Any) -> Any:
    """The weights that the network computes with."""
    return jaxvq.dequantize_params(
        _map_places(lambda place: jnp.where(place.done, place.after.dequantize(), place.before), params)
    )


def _batches(dataset: Dataset, config: TuneConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled and varied images without end."""
    generator = np.random.default_rng(config.seed)
    count, size = len(dataset.train_images), config.batch_size
    while True:
        order = generator.permutation(count)
        for start in range(0, count - size + 1, size):
            batch = order[start : start + size]
            yield augment(dataset.train_images[batch], generator), dataset.train_labels[batch]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def _step(
    tuner: _Tuner,
    trainable: Any,
    statistics: Any,
    state: optax.OptState,
    frozen: Any,
    teacher: Variables | None,
    rate: Float[Array, ""],
    batch: tuple[Float[Array, "b height width 3"], Int[Array, " b"]],
) -> tuple[Any, Any, optax.OptState]:
    images, labels = batch

    def loss(trainable: Any) -> tuple[Float[Array, ""], Any]:
        variables = {"params": _decoded(jaxvq.combine(trainable, frozen)), "batch_stats": statistics}
        logits, updates = tuner.model.apply(variables, images, train=True, mutable=["batch_stats"])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if teacher is not None:
            answers: Any = tuner.model.apply(teacher, images, train=False)
            share = tuner.distilled
            value = (1 - share) * value + share * jaxvq.distillation_loss(
                logits, answers, temperature=TEMPERATURE
            ).mean()
        return value, updates["batch_stats"]

    gradients, statistics = jax.grad(loss, has_aux=True)(trainable)
    changes, state = tuner.optimizer.update(gradients, state, trainable)
    changes = jax.tree.map(lambda change: -rate * change, changes)
    return optax.apply_updates(trainable, changes), statistics, state


def stored(variables: Variables) -> Variables:
    """The network as it is kept: centroids as int8 in units of a scale for each codebook, everything else float16."""

    def keep(leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedArray):
            return leaf.astype(jnp.float16)
        decoder: Any = leaf.decoder
        scale = jnp.maximum(jnp.max(jnp.abs(decoder.vectors), axis=(3, 4), keepdims=True), 1e-30) / INT8_MAX
        vectors = jnp.round(decoder.vectors / scale).astype(jnp.int8)
        return dataclasses.replace(leaf, decoder=Codebook(vectors, scale))

    return jax.tree.map(keep, variables, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))


def sensitivity(
    model: ResNet20, variables: Variables, dataset: Dataset, *, count: int, progress: Progress = iter
) -> dict[str, jaxvq.LayerStats]:
    """How much each weight matters: the mean squared gradient of the loss over single training images.

    This is the diagonal of the empirical Fisher information, for `jaxvq.quantize_params(..., stats=...)`. A
    thousandth of a layer's mean is added everywhere, for weights that none of the images needed.

    Args:
      model: the network.
      variables: its float variables.
      dataset: only the training part is looked at.
      count: how many images, from the first.
      progress: wraps the sequence of batches.
    """
    count = min(count, len(dataset.train_labels))
    total = None
    for start in progress(range(0, count, SENSITIVITY_BATCH)):
        part = slice(start, min(start + SENSITIVITY_BATCH, count))
        seen = _squared_gradients(model, variables, dataset.train_images[part], dataset.train_labels[part])
        total = seen if total is None else jax.tree.map(jnp.add, total, seen)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jaxvq.LayerStats.zeros(sums.shape).add(
            (sums + FLOOR * jnp.mean(sums)) / count
        )
        for path, sums in jax.tree.leaves_with_path(total)
        if sums.ndim > 1
    }


@functools.partial(jax.jit, static_argnums=0)
def _squared_gradients(
    model: ResNet20, variables: Variables, images: Float[Array, "b height width 3"], labels: Int[Array, " b"]
) -> Any:
    """The sum over the images of the squared gradients."""

    def loss(params: Any, image: Float[Array, "height width 3"], label: Int[Array, ""]) -> Float[Array, ""]:
        logits: Any = model.apply({**variables, "params": params}, image[None], train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label[None]).sum()

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(variables["params"], images, labels)
    return jax.tree.map(lambda leaf: jnp.sum(leaf**2, axis=0), gradients)
