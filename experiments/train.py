"""The network of the experiments, how it is trained and how it is tested."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

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
      learning_rate: the highest step size of Adam; it falls to zero along a cosine.
      seed: of the first weights and of the order of the images.
    """

    channels: tuple[int, int, int] = (16, 16, 32)
    hidden: int = 300
    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


class ConvNet(nn.Module):
    """Three blocks of convolution, batch normalization and ReLU, then two dense layers.

    The convolutions have no bias, because the normalization after them adds one.
    """

    channels: tuple[int, int, int]
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, images: Float[Array, "n height width c"], train: bool) -> Float[Array, "n classes"]:
        x = images
        for width, window, pool in zip(self.channels, (5, 3, 3), (False, True, True), strict=True):
            x = nn.Conv(width, (window, window), padding="SAME", use_bias=False)(x)
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
    learning_rate: float
    steps: int

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))


def network(config: TrainConfig, dataset: Dataset) -> ConvNet:
    """The network that `config` describes, for the classes of `dataset`."""
    return ConvNet(config.channels, config.hidden, dataset.classes)


def fit(dataset: Dataset, config: TrainConfig, *, progress: Progress = iter) -> Variables:
    """Trains the network.

    Args:
      dataset: the data; only the training part is looked at.
      config: the network and its training.
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
    trainer = _Trainer(network(config, dataset), config.learning_rate, steps)
    generator = np.random.default_rng(config.seed)
    variables: Any = trainer.model.init(jax.random.key(config.seed), dataset.train_images[:1], train=False)
    state = trainer.optimizer.init(variables["params"])
    for _ in progress(range(config.epochs)):
        order = generator.permutation(count)
        # One call per step: on CPUs a convolution inside `lax.scan` ran 12 times slower than outside.
        for start in range(0, count - config.batch_size + 1, config.batch_size):
            batch = order[start : start + config.batch_size]
            images, labels = dataset.train_images[batch], dataset.train_labels[batch]
            variables, state = _step(trainer, variables, state, images, labels)
    return variables


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(
    trainer: _Trainer,
    variables: Variables,
    state: optax.OptState,
    images: Float[Array, "b height width c"],
    labels: Int[Array, " b"],
) -> tuple[Variables, optax.OptState]:
    def loss(params: Any) -> tuple[Float[Array, ""], Any]:
        logits, updates = trainer.model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
    changes, state = trainer.optimizer.update(gradients, state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], changes), **updates}, state


def accuracy(model: ConvNet, variables: Variables, dataset: Dataset) -> float:
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
    model: ConvNet, variables: Variables, images: Float[Array, "b height width c"], labels: Int[Array, " b"]
) -> Int[Array, ""]:
    logits: Any = model.apply(variables, images, train=False)
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)
