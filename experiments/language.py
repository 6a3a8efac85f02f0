"""A small transformer that predicts the next word, to have an embedding table worth compressing."""

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

UNKNOWN = "<unknown>"
HELD_OUT = 0.1
CHUNK = 20

Progress = Callable[[Sequence[int]], Iterable[int]]


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The transformer and its training.

    Attributes:
      vocabulary: the most frequent words, and one for all others.
      width: of the embeddings and the layers.
      layers: blocks of attention and a two-layer network.
      heads: of attention.
      length: words that are looked at together.
      batch_size: stretches of text per step.
      steps: of training.
      learning_rate: the highest step size of Adam; it falls to zero along a cosine.
    """

    vocabulary: int = 2048
    width: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 64
    batch_size: int = 16
    steps: int = 1000
    learning_rate: float = 3e-3


class Transformer(nn.Module):
    """A decoder-only transformer; the table that embeds the words also predicts them (tied weights)."""

    config: LanguageConfig

    @nn.compact
    def __call__(self, words: Int[Array, "b t"]) -> Float[Array, "b t vocabulary"]:
        config = self.config
        first = nn.initializers.normal(0.02)
        table = self.param("embedding", first, (config.vocabulary, config.width))
        places = self.param("positions", first, (config.length, config.width))
        mask = nn.make_causal_mask(words)
        x = table[words] + places[: words.shape[1]]
        for _ in range(config.layers):
            x = x + nn.MultiHeadDotProductAttention(config.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(config.width)(nn.gelu(nn.Dense(4 * config.width)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x) @ table.T


def read_text(path: pathlib.Path | None) -> str:
    """A text file, or the documentation of the Python language that every Python brings along.

    Raises:
      FileNotFoundError: when there is no such file.
    """
    if path is not None:
        return path.read_text()
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def tokenize(text: str, vocabulary: int) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """Words and signs as numbers, the most frequent first; 0 stands for the rare ones."""
    words = re.findall(r"\w+|[^\w\s]|\n", text)
    common = [word for word, _ in collections.Counter(words).most_common(vocabulary - 1)]
    index = {word: number for number, word in enumerate(common, start=1)}
    return np.array([index.get(word, 0) for word in words], np.int32), [UNKNOWN, *common]


def split(words: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """The beginning of the text to train on, its last tenth to test on."""
    cut = int(len(words) * (1 - HELD_OUT))
    return words[:cut], words[cut:]


def train_model(words: Int[np.ndarray, " n"], config: LanguageConfig, *, seed: int, progress: Progress = iter) -> Any:
    """Trains the transformer on the beginning of the text.

    Returns:
      Its parameters.
    """
    train, _ = split(words)
    generator = np.random.default_rng(seed)
    start: Any = jax.jit(Transformer(config).init)(jax.random.key(seed), jnp.zeros((1, config.length), jnp.int32))
    params = start["params"]
    state = _optimizer(config).init(params)
    for _ in progress(range(-(-config.steps // CHUNK))):
        starts = generator.integers(0, len(train) - config.length - 1, (CHUNK, config.batch_size, 1))
        batches = train[starts + np.arange(config.length + 1)]
        params, state = _steps(config, params, state, batches)
    return params


def perplexity(params: Any, words: Int[np.ndarray, " n"], config: LanguageConfig) -> float:
    """The perplexity of the last tenth of the text: the words among which the model is as if undecided."""
    _, test = split(words)
    count = (len(test) - 1) // config.length
    starts = np.arange(count)[:, None] * config.length
    return float(jnp.exp(_loss(config, params, test[starts + np.arange(config.length + 1)])))


def _optimizer(config: LanguageConfig) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))


@functools.partial(jax.jit, static_argnums=0)
def _loss(config: LanguageConfig, params: Any, words: Int[Array, "b t"]) -> Float[Array, ""]:
    logits: Any = Transformer(config).apply({"params": params}, words[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, words[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _steps(config: LanguageConfig, params: Any, state: Any, batches: Int[Array, "steps b t"]) -> tuple[Any, Any]:
    def step(carry: Any, words: Int[Array, "b t"]) -> tuple[Any, None]:
        params, state = carry
        gradients = jax.grad(lambda params: _loss(config, params, words))(params)
        updates, state = _optimizer(config).update(gradients, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), batches)[0]
