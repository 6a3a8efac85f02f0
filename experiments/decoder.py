"""A decoder-only transformer as plain functions of a tree of arrays, any of whose matrices may be quantized.

Made to be decoded at batch 1, where each matrix is read for one row and the time between two small programs counts as
much as the programs: queries, keys and values come out of one product, so do the two halves of the gated unit, the
layers are unrolled (a scan over stacked layers would copy each of them first), and keys and values share an array.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

import jaxvq

Params = dict[str, Any]
Cache = list[Float[Array, "length kv_heads_twice head"]]
DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Model:
    """The shapes, by default those of Llama 3.2 1B (1.24 billion weights, the output layer is the embedding's table).

    Attributes:
      layers: blocks of attention and a gated unit.
      width: of the embeddings and the layers.
      heads: of the queries.
      kv_heads: of the keys and values; each serves `heads / kv_heads` queries.
      hidden: of the gated unit.
      vocabulary: tokens.
      rotary_base: the wavelength of the slowest rotation over `2 pi`, nearly.
      epsilon: added to a mean square.
    """

    layers: int = 16
    width: int = 2048
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 8192
    vocabulary: int = 128_256
    rotary_base: float = 500_000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        """Features of a head."""
        return self.width // self.heads


@functools.partial(jax.jit, static_argnames="model")
def init_table(key: Array, model: Model) -> Params:
    """The table that embeds the tokens and predicts them, random: `[vocabulary, width]`."""
    return {"table": _matrix(key, (model.vocabulary, model.width), 1.0)}


@functools.partial(jax.jit, static_argnames="model")
def init_layer(key: Array, model: Model) -> Params:
    """One layer with random weights.

    Matrices are `[out, in]`: for one row and a small matrix stored the other way XLA writes the product with every
    single weight to memory before it adds them up (JAX 0.10, GPU).

    All layers together add about as much as the embedding was. Else a random network makes more of rounding errors
    than a trained one, and logits could not be compared.
    """
    keys = jax.random.split(key, 4)
    adds = (2 * model.layers) ** -0.5
    return {
        "attention_norm": jnp.ones(model.width, DTYPE),
        "qkv": _matrix(keys[0], ((model.heads + 2 * model.kv_heads) * model.head, model.width), model.width**-0.5),
        "attention_out": _matrix(keys[1], (model.width, model.width), adds * model.width**-0.5),
        "gate_norm": jnp.ones(model.width, DTYPE),
        "gate_up": _matrix(keys[2], (2 * model.hidden, model.width), model.width**-0.5),
        "down": _matrix(keys[3], (model.width, model.hidden), adds * model.hidden**-0.5),
    }


def _matrix(key: Array, shape: tuple[int, int], size: float) -> Float[Array, "out in"]:
    # Drawn in float32: bfloat16 draws have few distinct values.
    return (size * jax.random.normal(key, shape)).astype(DTYPE)


def empty_cache(length: int, model: Model) -> Cache:
    """Room for the keys and values of `length` tokens, one array a layer."""
    return [jnp.zeros((length, 2 * model.kv_heads, model.head), DTYPE) for _ in range(model.layers)]


@functools.partial(jax.jit, static_argnames="model")
def forward(
    params: Params, cache: Cache, tokens: Int32[Array, " t"], position: Int32[Array, ""], model: Model
) -> tuple[Float32[Array, " vocabulary"], Cache]:
    """The logits after the last of `tokens`, which begin at `position`, and the cache with their keys and values.

    Activations are bfloat16 where a matrix reads them; the sums of the layers, norms, attention and logits float32.
    """
    x = jaxvq.take(params["table"], tokens).astype(jnp.float32)
    kept_layers = []
    for layer, kept in zip(params["layers"], cache, strict=True):
        mixed = _product_of_normed(x, layer["attention_norm"], layer["qkv"], model)
        attended, kept = _attend(mixed, kept, position, model)
        x = x + _product(attended, layer["attention_out"])
        gate, up = jnp.split(_product_of_normed(x, layer["gate_norm"], layer["gate_up"], model), 2, axis=1)
        x = x + _product(jax.nn.silu(gate) * up, layer["down"])
        kept_layers.append(kept)
    return _product_of_normed(x[-1:], params["norm"], params["table"], model)[0], kept_layers


@functools.partial(jax.jit, static_argnames=("count", "model"))
def decode(
    params: Params,
    logits: Float32[Array, " vocabulary"],
    cache: Cache,
    position: Int32[Array, ""],
    *,
    count: int,
    model: Model,
) -> tuple[Int32[Array, " count"], Float32[Array, " vocabulary"]]:
    """The `count` likeliest tokens one after the other, all in one program, and the logits after the last.

    Args:
      params: the model.
      logits: those after the prompt.
      cache: that after the prompt.
      position: of the first new token.
      count: new tokens; fixed, so that the device asks nobody whether it is done.
      model: the shapes.
    """

    def step(index: Int32[Array, ""], state: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
        tokens, logits, cache = state
        token = jnp.argmax(logits).astype(jnp.int32)
        logits, cache = forward(params, cache, token[None], position + index, model)
        return tokens.at[index].set(token), logits, cache

    tokens, logits, _ = lax.fori_loop(0, count, step, (jnp.zeros(count, jnp.int32), logits, cache))
    return tokens, logits


def _product(x: Float[Array, "t in"], weight: Any) -> Float32[Array, "t out"]:
    return jaxvq.matmul(x.astype(DTYPE), weight, transpose=True).astype(jnp.float32)


def _product_of_normed(
    x: Float32[Array, "t in"], norm: Float[Array, " in"], weight: Any, model: Model
) -> Float32[Array, "t out"]:
    """`weight` times `x` over its root mean square.

    The division comes after the product, which so does not wait for the mean. The barrier keeps the two apart, and they
    can be computed at the same time.
    """
    root = lax.rsqrt(jnp.mean(lax.optimization_barrier(x) ** 2, axis=1, keepdims=True) + model.epsilon)
    return _product(x * norm, weight) * root


def _attend(
    mixed: Float32[Array, "t features"],
    kept: Float[Array, "length kv_heads_twice head"],
    position: Int32[Array, ""],
    model: Model,
) -> tuple[Float32[Array, "t features_out"], Float[Array, "length kv_heads_twice head"]]:
    """Causal attention of grouped queries, and the keys and values with the new ones."""
    t, (length, kv_heads_twice, head) = mixed.shape[0], kept.shape
    kv_heads, turned_heads = kv_heads_twice // 2, model.heads + kv_heads_twice // 2
    heads = mixed.reshape(t, -1, head)
    turned = _turn(heads[:, :turned_heads], _turns(length, position, t, model))
    new = jnp.concatenate([turned[:, model.heads :], heads[:, turned_heads:]], axis=1)
    kept = lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), position, axis=0)
    queries = turned[:, : model.heads].reshape(t, kv_heads, -1, 1, head)
    keys, values = (part.astype(jnp.float32) for part in jnp.split(kept, 2, axis=1))
    # Sums of products along the last axis, which on a GPU become one program; matrix products would be five.
    scores = jnp.sum(queries * keys.transpose(1, 0, 2)[:, None], axis=-1) / head**0.5
    seen = jnp.arange(length) <= (position + jnp.arange(t))[:, None, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    shares = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    attended = jnp.sum(shares[:, :, :, None] * values.transpose(1, 2, 0)[:, None], axis=-1)
    # Divided last: once a feature, not once a token that is kept.
    attended = attended / jnp.sum(shares, axis=-1)[..., None]
    return attended.reshape(t, -1), kept


def _turns(length: int, position: Int32[Array, ""], t: int, model: Model) -> Float32[Array, "two t 1 half"]:
    """The cosines and sines for `t` positions, from a table of all: every layer of every token needs them."""
    half = model.head // 2
    angles = np.outer(np.arange(length), model.rotary_base ** -(np.arange(half) / half))
    table = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)
    return lax.dynamic_slice_in_dim(table, position, t, axis=1)[:, :, None]


def _turn(
    heads: Float32[Array, "t heads head"], turns: Float32[Array, "two t 1 half"]
) -> Float32[Array, "t heads head"]:
    """Turns each pair of features, one of each half, by an angle that grows with the position.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv 2104.09864.
    """
    a, b = jnp.split(heads, 2, axis=2)
    cosine, sine = turns
    return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=2)
