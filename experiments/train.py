"""What experiments share: a convolutional network, how it is trained and tested, and the options of a command line."""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import jaxvq
from experiments.data import Dataset

TEST_BATCH = 1_000
NO_LABEL = -1
MOMENTUM = 0.9

Variables = dict[str, Any]
Progress = Callable[[Sequence[int]], Iterable[int]]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How large the network is and how it is trained.

    Attributes:
      channels: output channels of the three convolutions.
      hidden: width of the first dense layer.
      epochs: passes over the training images.
      batch_size: images per step.
      learning_rate: the highest step size of Adam.
      decay: let the step size fall to zero along a cosine.
      l1: what the sum of the absolute values of all parameters adds to the loss, times this.
      conv_bias: give the convolutions a bias, although the normalization after them adds one.
      seed: of the first weights and of the order of the images.
    """

    channels: tuple[int, int, int] = (16, 16, 32)
    hidden: int = 300
    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 3e-3
    decay: bool = True
    l1: float = 0.0
    conv_bias: bool = False
    seed: int = 0


class ConvNet(nn.Module):
    """Three blocks of convolution, batch normalization and ReLU, then two dense layers."""

    channels: tuple[int, int, int]
    hidden: int
    classes: int
    conv_bias: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "n height width c"], train: bool) -> Float[Array, "n classes"]:
        x = images
        for width, window, pool in zip(self.channels, (5, 3, 3), (False, True, True), strict=True):
            x = nn.Conv(width, (window, window), padding="SAME", use_bias=self.conv_bias)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
            x = nn.relu(x)
            if pool:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.classes)(x)


@dataclasses.dataclass(frozen=True)
class _Trainer:
    """What a step needs beside arrays; compared by value, so that its program compiles once."""

    model: ConvNet
    config: TrainConfig
    steps: int

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = self.config.learning_rate
        return optax.adam(optax.cosine_decay_schedule(rate, self.steps) if self.config.decay else rate)


def network(config: TrainConfig, dataset: Dataset) -> ConvNet:
    """The network that `config` describes, for the classes of `dataset`."""
    return ConvNet(config.channels, config.hidden, dataset.classes, config.conv_bias)


def fit(
    dataset: Dataset, config: TrainConfig, *, start: Variables | None = None, progress: Progress = iter
) -> Variables:
    """Trains the network.

    Args:
      dataset: the data; only the training part is looked at.
      config: the network and its training.
      start: variables to train on from, instead of new ones; of quantized parameters only the codebooks train.
      progress: wraps the sequence of epochs, such as `rich.progress.track`.

    Returns:
      The variables of the network, collections `params` and `batch_stats`.

    Raises:
      ValueError: when there are fewer training images than make one batch.
    """
    count = len(dataset.train_images)
    if count < config.batch_size:
        raise ValueError(
            f"`batch_size` must be at most the {count} training images, got {config.batch_size}; use a smaller one"
        )
    steps = config.epochs * (count // config.batch_size)
    trainer = _Trainer(network(config, dataset), dataclasses.replace(config, seed=0), steps)
    generator = np.random.default_rng(config.seed)
    variables = start or begin(config, dataset)
    trainable, frozen = jaxvq.partition(jax.tree.map(jnp.copy, variables["params"]))
    statistics, state = jax.tree.map(jnp.copy, variables["batch_stats"]), trainer.optimizer.init(trainable)
    for _ in progress(range(config.epochs)):
        order = generator.permutation(count)
        # One call per step: on CPUs a convolution inside `lax.scan` ran 12 times slower than outside.
        for first in range(0, count - config.batch_size + 1, config.batch_size):
            batch = order[first : first + config.batch_size]
            images, labels = dataset.train_images[batch], dataset.train_labels[batch]
            trainable, statistics, state = _step(trainer, trainable, statistics, state, frozen, images, labels)
    return {"params": jaxvq.combine(trainable, frozen), "batch_stats": statistics}


def begin(config: TrainConfig, dataset: Dataset) -> Variables:
    """The variables of the network before its training."""
    return _begin(network(config, dataset), jax.random.key(config.seed), dataset.train_images[:1])


@functools.partial(jax.jit, static_argnums=0)
def _begin(model: ConvNet, key: Array, images: Float[Array, "1 height width c"]) -> Variables:
    variables: Any = model.init(key, images, train=False)  # one program, not one for each step of each layer
    return variables


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def _step(
    trainer: _Trainer,
    trainable: Any,
    statistics: Any,
    state: optax.OptState,
    frozen: Any,
    images: Float[Array, "b height width c"],
    labels: Int[Array, " b"],
) -> tuple[Any, Any, optax.OptState]:
    def loss(trainable: Any) -> tuple[Float[Array, ""], Any]:
        params = jaxvq.dequantize_params(jaxvq.combine(trainable, frozen))
        variables = {"params": params, "batch_stats": statistics}
        logits, updates = trainer.model.apply(variables, images, train=True, mutable=["batch_stats"])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if trainer.config.l1:
            value += trainer.config.l1 * sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(params))
        return value, updates["batch_stats"]

    gradients, statistics = jax.grad(loss, has_aux=True)(trainable)
    changes, state = trainer.optimizer.update(gradients, state, trainable)
    return optax.apply_updates(trainable, changes), statistics, state


def accuracy(model: nn.Module, variables: Variables, dataset: Dataset) -> float:
    """The fraction of test images that the network gets right.

    The variables are arguments of the compiled program, so that every variant of a network uses the same one.
    """
    correct = [_count_correct(model, variables, images, labels) for images, labels in _test_batches(dataset)]
    return sum(map(int, correct)) / len(dataset.test_labels)


def _test_batches(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The test images in batches of one size; images that only fill the last one have a label no class has."""
    count = len(dataset.test_labels)
    size = -(-count // -(-count // TEST_BATCH))
    for start in range(0, count, size):
        images, labels = dataset.test_images[start : start + size], dataset.test_labels[start : start + size]
        rest = size - len(labels)
        yield np.pad(images, ((0, rest), (0, 0), (0, 0), (0, 0))), np.pad(labels, (0, rest), constant_values=NO_LABEL)


@functools.partial(jax.jit, static_argnums=0)
def _count_correct(
    model: nn.Module, variables: Variables, images: Float[Array, "b height width c"], labels: Int[Array, " b"]
) -> Int[Array, ""]:
    logits: Any = model.apply(variables, images, train=False)
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)


def options(arguments: Sequence[str], *, name: str, description: str | None) -> argparse.Namespace:
    """What the command line of `experiments/<name>.py` says: `dataset`, `smoke`, `out` and `seeds`."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=description)
    parser.add_argument("--dataset", choices=("digits", "mnist"), help="mnist, or digits with --smoke")
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument("--out", type=pathlib.Path, default=f"runs/{name}", help="the folder to write to")
    parser.add_argument("--seeds", type=int, default=3, help="how many networks are trained")
    asked = parser.parse_args(arguments)
    asked.dataset = asked.dataset or ("digits" if asked.smoke else "mnist")
    return asked
