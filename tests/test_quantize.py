"""The main job on trees of every framework, and its refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxvq
from jaxvq import KMeans, LayerStats, Product, QuantizedArray, RowVQ, Rule, Spec, Uniform
from jaxvq.array import is_quantized
from jaxvq.cluster.palettes import fit_palettes
from jaxvq.cluster.product import fit_product


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


@pytest.fixture
def linen_params(key):
    return Network().init(key, jnp.ones((1, 6, 6, 3)))["params"]


def test_linen_network_still_runs(linen_params, key, rng):
    images = jnp.asarray(rng.normal(size=(16, 6, 6, 3)), jnp.float32)
    quantized = jaxvq.quantize_params(linen_params, KMeans(bits=6), key=key)
    assert isinstance(quantized["Conv_0"]["kernel"], QuantizedArray)
    assert quantized["Conv_0"]["bias"] is linen_params["Conv_0"]["bias"]
    run = jax.jit(lambda params: Network().apply({"params": jaxvq.dequantize_params(params)}, images))
    before, after = Network().apply({"params": linen_params}, images), run(quantized)
    assert float(jnp.mean((before - after) ** 2)) < 0.01 * float(jnp.mean(before**2))


def test_nnx_state(key):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(12, 20, rngs=rngs)
            self.embed = nnx.Embed(30, 12, rngs=rngs)

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    quantized = jaxvq.quantize_params(state, Spec((Rule("dense/kernel", Uniform(8)),), default=RowVQ(k=29)), key=key)
    paths = {entry.path: entry for entry in jaxvq.resolve(state, Uniform(8)).entries}
    assert paths["embed/embedding"].layout.out_axis == 0
    model = nnx.merge(graph, jaxvq.dequantize_params(quantized))
    original = nnx.merge(graph, state)
    x = jnp.ones((2, 12))
    np.testing.assert_allclose(model.dense(x), original.dense(x), atol=0.05)
    assert len(np.unique(np.asarray(model.embed.embedding[...]), axis=0)) == 29


def test_lists_tuples_and_dataclasses(key, rng):
    weight = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    tree = [weight, (weight, {"a": weight}), None, optax.TraceState(trace=weight)]
    quantized = jaxvq.quantize_params(tree, Uniform(bits=2), key=key)
    assert jax.tree.structure(quantized, is_leaf=is_quantized) == jax.tree.structure(tree)
    assert all(map(is_quantized, jax.tree.leaves(quantized, is_leaf=is_quantized)))
    assert jax.tree.structure(jaxvq.dequantize_params(quantized)) == jax.tree.structure(tree)


def test_stacked_layers_run_under_scan(key, rng):
    stack = jnp.asarray(rng.normal(size=(3, 16, 16)), jnp.float32)
    quantized = jaxvq.quantize_params({"k": stack}, Rule("k", KMeans(bits=4), stacked=1), key=key)["k"]
    assert quantized.shape == (3, 16, 16)
    one = jaxvq.quantize_params({"k": stack[1]}, KMeans(bits=4), key=key)["k"]
    np.testing.assert_array_equal(quantized.dequantize()[1], one.dequantize())
    x = jnp.ones(16)
    y, _ = jax.lax.scan(lambda h, layer: (h @ layer.dequantize(), None), x, quantized)
    np.testing.assert_allclose(y, np.linalg.multi_dot([x, *np.asarray(quantized.dequantize())]), rtol=1e-4)


def test_jitted_whole_gives_the_same_codes(linen_params, key):
    spec = Spec((Rule("Conv.*kernel", Product(bits=3, dim=9)),), default=KMeans(bits=3))
    eager = jaxvq.quantize_params(linen_params, spec, key=key)
    jitted = jax.jit(lambda p: jaxvq.quantize_params(p, spec, key=key))(linen_params)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_leaf_does_not_depend_on_the_others(key, rng):
    weight = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    method = Product(bits=4, dim=4)
    alone = jaxvq.quantize_params({"w": weight}, method, key=key)["w"]
    beside = jaxvq.quantize_params({"a": weight + 1, "w": weight}, method, key=key)["w"]
    np.testing.assert_array_equal(alone.codes.words, beside.codes.words)
    other = jaxvq.quantize_params({"v": weight}, method, key=key)["v"]
    assert bool(jnp.any(other.codes.words != alone.codes.words))


def test_codes_survive_a_thousand_adamw_steps(key, rng):
    quantized = jaxvq.quantize_params(
        {"w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}, KMeans(bits=2), key=key
    )
    trainable, frozen = jaxvq.partition(quantized)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)

    def loss(trainable):
        return jnp.sum(jaxvq.dequantize_params(jaxvq.combine(trainable, frozen))["w"] ** 2)

    def step(carry, _):
        trainable, state = carry
        updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
        return (optax.apply_updates(trainable, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (trainable, optimizer.init(trainable)), length=1000)
    after = jaxvq.combine(trained, frozen)
    np.testing.assert_array_equal(after["w"].codes.words, quantized["w"].codes.words)
    assert bool(jnp.any(after["w"].decoder.vectors != quantized["w"].decoder.vectors))


def test_importance_comes_from_statistics(key, rng):
    weight = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    stats = LayerStats.zeros(weight.shape).add(jnp.where(jnp.arange(64) < 4, 1e3, 1e-3)[:, None])
    plain = jaxvq.quantize_params({"w": weight}, KMeans(bits=2), key=key)["w"].dequantize()
    tuned = jaxvq.quantize_params({"w": weight}, KMeans(bits=2), key=key, stats={"w": stats})["w"].dequantize()
    assert float(jnp.mean((weight - tuned)[:4] ** 2)) < 0.95 * float(jnp.mean((weight - plain)[:4] ** 2))


def test_progress_sees_every_quantized_leaf(linen_params, key):
    seen = []

    def progress(entries):
        for entry in entries:
            seen.append(entry.path)
            yield entry

    jaxvq.quantize_params(linen_params, Uniform(4), key=key, progress=progress)
    assert seen == ["Conv_0/kernel", "Dense_0/kernel"]


def experiment_network():
    """The shapes of the experiments' convolutional network on 28 x 28 images."""
    shapes = [(5, 5, 1, 16), (3, 3, 16, 16), (3, 3, 16, 32), (1568, 300), (300, 10)]
    return {f"layer_{i}": {"kernel": jnp.ones(shape) * jnp.arange(shape[-1])} for i, shape in enumerate(shapes)}


@pytest.mark.parametrize(
    ("method", "program"),
    [(KMeans(bits=4), fit_palettes), (Product(k=16, dim=4), fit_product)],
    ids=["KMeans", "Product"],
)
def test_whole_network_compiles_few_clustering_programs(method, program, key):
    program.clear_cache()
    jaxvq.quantize_params(experiment_network(), method, key=key)
    assert 1 <= program._cache_size() <= 6


@pytest.mark.parametrize(("value", "count"), [(np.nan, 1), (np.inf, 2)])
def test_weight_that_is_not_finite(value, count, key):
    weight = np.ones((8, 4), np.float32)
    weight.flat[:count] = value
    with pytest.raises(
        ValueError, match=rf"Dense_0/kernel: the weight must be finite, got {count} NaN or Inf among 32"
    ):
        jaxvq.quantize_params({"Dense_0": {"kernel": weight}}, Uniform(4), key=key)


def test_statistics_of_another_leaf(key):
    with pytest.raises(ValueError, match="v: `stats` must name leaves of `params`, got this path; it has w"):
        jaxvq.quantize_params({"w": jnp.ones((8, 4))}, Uniform(4), key=key, stats={"v": LayerStats.zeros((8, 4))})


def test_statistics_of_another_shape(key):
    with pytest.raises(ValueError, match=r"w: `stats` must have the weight's shape \(8, 4\), got \(4, 8\)"):
        jaxvq.quantize_params({"w": jnp.ones((8, 4))}, Uniform(4), key=key, stats={"w": LayerStats.zeros((4, 8))})


def test_statistics_that_are_not_finite(key):
    stats = LayerStats.zeros((8, 4)).add(jnp.full((8, 4), jnp.nan))
    with pytest.raises(ValueError, match="w: the importance must be finite, got 32 NaN"):
        jaxvq.quantize_params({"w": jnp.ones((8, 4))}, KMeans(bits=1), key=key, stats={"w": stats})


def test_leaf_without_a_method():
    entry = jaxvq.resolve({"b": jnp.ones(3)}, Uniform(4)).entries[0]
    from jaxvq.quantize import quantize_leaf

    with pytest.raises(ValueError, match="b: `entry` must have a method, got one that stays float"):
        quantize_leaf(jnp.ones(3), entry, key=jax.random.key(0))


def test_nnx_state_with_random_keys(key):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(12, 20, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    quantized = jaxvq.quantize_params(state, Uniform(8), key=key)
    trainable, frozen = jaxvq.partition(quantized)
    assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(trainable))
    merged = nnx.merge(graph, jaxvq.dequantize_params(jaxvq.combine(trainable, frozen)))
    assert merged.drop.rngs.key[...] == state["drop"]["rngs"]["key"][...]


def test_functions_and_texts_are_left_alone(key):
    params = {"act": jnp.tanh, "name": "relu", "w": jnp.ones((8, 4))}
    quantized = jaxvq.quantize_params(params, Uniform(8), key=key)
    assert (quantized["act"], quantized["name"]) == (jnp.tanh, "relu")


def test_double_precision_is_quantized_as_single(key):
    quantized = jaxvq.quantize_params({"w": np.eye(8)}, Uniform(1), key=key)["w"]
    assert quantized.dtype == "float32"
    np.testing.assert_array_equal(quantized.dequantize(), np.eye(8))


WEIGHT = {"w": np.ones((8, 4), np.float32), "b": np.ones(4, np.float32)}
SEEN = LayerStats(jnp.ones((8, 4)), jnp.ones(()))


@pytest.mark.parametrize(
    ("stats", "error", "message"),
    [
        ({"w": np.ones((8, 4))}, TypeError, "w: `stats` must hold LayerStats, got ndarray"),
        ([SEEN], TypeError, "`stats` must map paths to LayerStats, got list"),
        ({"b": SEEN}, ValueError, "b: `stats` must name leaves that the spec quantizes, got one that stays float"),
        ({"w": LayerStats.zeros((8, 4))}, ValueError, "w: `stats` must have seen something, .* nothing was added"),
        ({"w": SEEN.add(-3)}, ValueError, "w: the importance must not be negative, got -1; add squares"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_statistics(stats, error, message, key):
    with pytest.raises(error, match=message):
        jaxvq.quantize_params(WEIGHT, KMeans(bits=1), key=key, stats=stats)


def test_statistics_take_numbers_and_lists():
    stats = LayerStats.zeros((2, 3)).add(2).add([[1], [3]]).add(np.ones(3))
    np.testing.assert_array_equal(stats.total, [[4, 4, 4], [6, 6, 6]])


@pytest.mark.parametrize("shape", [(4, 2, 3), (1, 2, 3), (2,), (4, 3)])
def test_statistics_do_not_grow(shape):
    with pytest.raises(ValueError, match=r"`importance` must broadcast to the weight's shape \(2, 3\), got"):
        LayerStats.zeros((2, 3)).add(np.ones(shape))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(0, TypeError), (None, TypeError), (np.ones(2), TypeError), (jax.random.split(jax.random.key(0)), ValueError)],
)
@pytest.mark.usefixtures("unchecked")
def test_something_else_than_a_key(wrong, error):
    with pytest.raises(error, match=r"`key` must be .*random key, got .*; use jax.random.key\(0\)"):
        jaxvq.quantize_params(WEIGHT, Uniform(1), key=wrong)


def test_old_and_traced_keys():
    quantize = jax.jit(lambda key: jaxvq.quantize_params(WEIGHT, Uniform(1), key=key))
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert isinstance(quantize(key)["w"], QuantizedArray)
