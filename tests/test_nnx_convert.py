"""Conversion of whole nnx models in place, training them, and their way through files."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import DECODERS
from flax import nnx

import jaxvq
import jaxvq.nnx as jnn
from jaxvq import (
    KMeans,
    LayerStats,
    Product,
    QuantizedArray,
    QuantNoise,
    Rule,
    SoftAssignment,
    Spec,
    StraightThrough,
    Symmetric,
    Uniform,
)

FINE = Uniform(bits=8)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(12, 12, rngs=rngs), nnx.Linear(12, 12, rngs=rngs)])
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(12, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.drop(self.norm(x)))


class Tied(nnx.Module):
    """One parameter in two layers, and one layer in two places."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(30, 12, rngs=rngs)
        self.first = nnx.Linear(12, 12, rngs=rngs)
        self.second = nnx.Linear(12, 12, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.again = nnx.data([self.second, {"embed": self.embed}])

    def __call__(self, ids):
        return self.again[1]["embed"].attend(self.again[0](self.first(self.embed(ids))))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(12, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=3, in_features=12, decode=False, rngs=rngs)
        self.mix = nnx.Einsum("bta,ac->btc", (12, 12), rngs=rngs)

    def __call__(self, x):
        return x + self.mix(self.attention(self.norm(nnx.relu(self.linear(x)))))


@functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
@nnx.remat
def through(x, block):
    return block(x)


class Stack(nnx.Module):
    """Several layers as one, whose parameters have an axis more."""

    def __init__(self, rngs, kind, count):
        self.blocks = nnx.vmap(kind)(nnx.split_rngs(splits=count)(lambda rngs: nnx.clone(rngs))(rngs))

    def __call__(self, x):
        return through(x, self.blocks)


@pytest.fixture
def model():
    model = Network(nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_converts_in_place_and_back(model, x, key):
    bias, first, before = model.layers[0].bias, model.layers[0], model(x)
    first.remark = "mine"
    assert jnn.quantize_model(model, FINE, key=key) is model
    assert model.layers[0] is first
    assert (type(first), type(first.kernel), first.bias is bias) == (jnn.Linear, jnn.Quantized, True)
    assert (type(model.norm), type(model.norm.scale), first.remark) == (nnx.BatchNorm, nnx.Param, "mine")
    after = model(x)
    assert 0 < float(jnp.linalg.norm(after - before)) < 0.05 * float(jnp.linalg.norm(before))
    kernel = model.head.kernel[...]
    assert jnn.dequantize_model(model) is model
    assert (type(first), type(model.head.kernel)) == (nnx.Linear, nnx.Param)
    np.testing.assert_array_equal(model.head.kernel[...], kernel)
    np.testing.assert_allclose(model(x), after, rtol=1e-5)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(Network(nnx.Rngs(0))))


def test_codes_are_those_of_quantize_params(model, key):
    spec = Spec((Rule("head/kernel", Product(bits=2, dim=4)),), default=Symmetric(bits=3))
    tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    want = jaxvq.quantize_params(tree, spec, key=key)
    params = jnn.params_of(jnn.quantize_model(model, spec, key=key))
    assert isinstance(params["layers"][1]["kernel"], QuantizedArray)
    for one, other in ((params["layers"], want["layers"]), (params["head"], want["head"])):
        assert_same(one, other)


def test_statistics_and_progress(model, key, x):
    weight = model.layers[0].kernel[...]
    importance = jnp.abs(weight) + jnp.arange(12)
    stats, seen = {"layers/0/kernel": LayerStats.zeros((12, 12)).add(importance)}, []
    spec = Rule("layers/0/kernel", KMeans(bits=3))
    want = jaxvq.quantize_params({"layers": [{"kernel": weight}]}, spec, key=key, stats=stats)
    jnn.quantize_model(model, spec, key=key, stats=stats, progress=lambda entries: seen.extend(entries) or entries)
    assert_same(model.layers[0].kernel.array, want["layers"][0]["kernel"])
    assert [entry.path for entry in seen] == ["layers/0/kernel"]
    jnn.quantize_model(
        model,
        Rule("head/kernel", Symmetric(bits=4)),
        key=key,
        training=StraightThrough(),
        progress=lambda entries: seen.extend(entries) or entries,
    )
    assert seen[-1].path == "head/kernel"


@pytest.mark.parametrize("training", [None, QuantNoise(0.5)])
def test_twice_is_harmless(model, key, training):
    for spec in (FINE, Rule(".*kernel", FINE)):
        jnn.quantize_model(model, spec, key=key, training=training)
        kernel, state = model.head.kernel, nnx.state(model)
    assert model.head.kernel is kernel
    jnn.quantize_model(model, FINE, key=key)
    assert model.head.kernel is kernel
    assert_same(jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(nnx.filter_state(state, nnx.Param)))


def test_ties_stay(key):
    model = Tied(nnx.Rngs(0))
    ids = jnp.array([[1, 2, 29]])
    jnn.quantize_model(model, FINE, key=key, act_bits=8)
    assert model.first.kernel is model.second.kernel
    assert model.again[0] is model.second
    assert model.again[1]["embed"] is model.embed
    assert type(model.second) is jnn.Linear
    assert model.embed.act_bits == 8
    assert sorted(jnn.params_of(model)) == ["again", "first"]  # where they come first
    outputs = model(ids)
    reloaded = jnn.load_params(Tied(nnx.Rngs(1)), jnn.params_of(model))
    assert reloaded.first.kernel is reloaded.second.kernel
    jnn.dequantize_model(model)
    assert model.first.kernel is model.second.kernel
    assert type(model.embed) is nnx.Embed
    np.testing.assert_allclose(reloaded(ids), model(ids), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs, model(ids), atol=0.05)


def test_training_keeps_ties_and_the_parameter(key):
    model = Tied(nnx.Rngs(0))
    param = model.first.kernel
    jnn.quantize_model(model, Symmetric(bits=4), key=key, training=StraightThrough())
    assert model.first.kernel is model.second.kernel
    assert model.first.kernel.weight is param
    jnn.harden_model(model, key=key)
    assert type(model.first.kernel) is jnn.Quantized
    assert model.first.kernel is model.second.kernel
    model = jnn.quantize_model(Tied(nnx.Rngs(0)), Symmetric(bits=4), key=key, training=StraightThrough())
    param = model.first.kernel.weight
    jnn.dequantize_model(model)
    assert model.first.kernel is param is model.second.kernel


def test_a_model_that_is_a_layer(key):
    model = nnx.Conv(2, 3, (2, 2), rngs=nnx.Rngs(0))
    assert type(jnn.quantize_model(model, FINE, key=key)) is jnn.Conv
    assert type(jnn.dequantize_model(model)) is nnx.Conv


def test_any_other_module_reads_the_weight(key, x):
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jax.random.normal(rngs.params(), (12, 12)))
            self.attention = nnx.MultiHeadAttention(num_heads=3, in_features=12, decode=False, rngs=rngs)
            self.lora = nnx.LoRALinear(12, 12, lora_rank=2, rngs=rngs)

        def __call__(self, x):
            return self.lora(self.attention(x[None] @ self.w))

    model = Own(nnx.Rngs(0))
    before = model(x)
    jnn.quantize_model(model, FINE, key=key)
    assert type(model.attention.query) is nnx.LinearGeneral
    assert type(model.attention.query.kernel) is type(model.w) is type(model.lora.kernel) is jnn.Quantized
    assert (type(model.lora), type(model.lora.lora.lora_a)) == (nnx.LoRALinear, nnx.LoRAParam)
    assert type(model.attention.query.bias) is nnx.Param  # of rank 2
    after = model(x)
    assert 0 < float(jnp.linalg.norm(after - before)) < 0.05 * float(jnp.linalg.norm(before))
    jnn.quantize_model(model, Rule(".*/(bias|lora_a)", FINE), key=key)
    assert type(model.attention.query.bias) is type(model.lora.lora.lora_a) is jnn.Quantized
    np.testing.assert_allclose(model(x), after, rtol=0.02, atol=0.02)


def test_stacked_parameters_of_other_modules_need_a_rule(key):
    class Own(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jax.random.normal(jax.random.key(1), (3, 12, 12)))

        def __call__(self, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, self.w[...])[0]

    model, x = Own(), jnp.ones((2, 12))
    want = jaxvq.quantize_params({"w": model.w[...]}, Rule("w", FINE, stacked=1), key=key)["w"]
    before = model(x)
    jnn.quantize_model(model, Rule("w", FINE, stacked=1), key=key)
    assert_same(model.w.array, want)
    np.testing.assert_allclose(model(x), before, atol=0.1)


def test_stacked_layers(key):
    model, x = Stack(nnx.Rngs(0), Block, 2), jnp.ones((2, 5, 12)) * jnp.arange(5)[:, None]
    linear = model.blocks.linear.kernel[...]
    jnn.quantize_model(model, Rule("blocks/attention.*kernel", FINE), key=key)
    jnn.quantize_model(model, Spec(default=FINE), key=key)
    blocks = model.blocks
    for kernel in (blocks.linear.kernel, blocks.attention.query.kernel, blocks.attention.out.kernel, blocks.mix.kernel):
        assert kernel.array.stack == (2,)
    assert {type(small) for small in (blocks.linear.bias, blocks.norm.scale, blocks.mix.bias)} == {
        nnx.Param,
        type(None),
    }
    want = jaxvq.quantize_params({"blocks": {"linear": {"kernel": linear}}}, Rule(".*", FINE, stacked=1), key=key)
    assert_same(blocks.linear.kernel.array, want["blocks"]["linear"]["kernel"])

    @nnx.jit
    def run(model, x):
        return nnx.grad(lambda model: (jnp.sum((out := model(x)) ** 2), out), has_aux=True)(model)

    gradient, outputs = run(model, x)
    assert gradient["blocks"]["linear"]["kernel"]["scale"].shape == (2, 1, 1, 1)
    reloaded = jnn.load_params(Stack(nnx.Rngs(1), Block, 2), jnn.params_of(model))
    assert_same(reloaded.blocks.linear.kernel.array, blocks.linear.kernel.array)
    jnn.dequantize_model(model)
    np.testing.assert_allclose(model(x), outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("training", "method"),
    [(QuantNoise(0.5), KMeans(bits=2)), (SoftAssignment(0.05), KMeans(bits=2)), (StraightThrough(), Symmetric(4))],
    ids=str,
)
def test_stacked_layers_train(training, method, key):
    model, x = Stack(nnx.Rngs(0), lambda rngs: nnx.Linear(8, 8, rngs=rngs), 3), jnp.ones((2, 8))
    jnn.quantize_model(model, method, key=key, training=training, act_bits=8, act_momentum=0.5)
    kernel = model.blocks.kernel
    before = jax.tree.map(np.asarray, nnx.state(kernel, jnn.TrainingState))
    outputs = model(x)
    assert model.blocks.input_range.shape == (3, 2)
    assert not np.isnan(model.blocks.input_range[...]).any()
    whole = nnx.clone(kernel)[...]  # all of them at once, outside of the scan
    assert whole.shape == (3, 8, 8)
    if isinstance(training, QuantNoise):
        assert not np.array_equal(model(x), outputs)
        assert kernel.noise.count[...].tolist() == [2, 2, 2]
        assert len({(np.asarray(one) == 0).tobytes() for one in whole}) == 3  # a noise for each
    for name, state in before.get("state", {}).items():
        assert not np.array_equal(kernel.state[name][...], state[...])
    model.eval()
    outputs = model(x)
    jnn.harden_model(model, key=key)
    assert model.blocks.kernel.array.stack == (3,)
    if isinstance(training, QuantNoise):
        want = jaxvq.quantize_params({"blocks": {"kernel": kernel.weight[...]}}, Rule(".*", method, stacked=1), key=key)
        assert_same(model.blocks.kernel.array, want["blocks"]["kernel"])
    else:
        np.testing.assert_allclose(model(x), outputs, rtol=1e-5, atol=1e-6)


def test_layers_made_quantized_under_vmap():
    @nnx.split_rngs(splits=3)
    @functools.partial(nnx.vmap, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs):
        metadata = {"out_sharding": ("embed", "mlp"), "eager_sharding": False}
        return jnn.Linear(8, 8, method=Symmetric(bits=4, per="channel"), kernel_metadata=metadata, rngs=rngs)

    layers = make(nnx.Rngs(0))
    assert layers.kernel.array.stack == (3,)
    spec = nnx.get_partition_spec(nnx.state(layers))["kernel"]
    assert spec["words"].get_value() == jax.P("layers", None, "mlp", None)
    assert spec["scale"].get_value() == jax.P("layers", None, "mlp", None)
    run = functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    run = run(lambda x, layer: layer(x), transform_metadata={nnx.PARTITION_NAME: "layers"})
    x = jnp.ones((2, 8))
    outputs = run(x, layers)
    jnn.dequantize_model(layers)
    assert layers.kernel.get_metadata("out_sharding") == ("layers", "embed", "mlp")
    np.testing.assert_allclose(run(x, layers), outputs, rtol=1e-5)


@pytest.mark.parametrize("method", [Symmetric(bits=4), Uniform(bits=4, per="channel"), Uniform(bits=4, per=1)])
def test_sharding_annotations(method, key):
    metadata = {"out_sharding": ("embed", "mlp"), "eager_sharding": False}
    layer = nnx.Linear(
        128, 24, kernel_metadata=metadata, bias_metadata=metadata | {"out_sharding": ("mlp",)}, rngs=nnx.Rngs(0)
    )
    layer = jnn.quantize_model(layer, method, key=key)
    spec = nnx.get_partition_spec(nnx.state(layer))
    assert spec["bias"].get_value() == jax.P("mlp")
    assert spec["kernel"]["words"].get_value() == jax.P(None, "mlp", None)
    names = {"tensor": (None, None, None), "channel": (None, "mlp", None), 1: ("embed", "mlp", None)}[method.per]
    assert spec["kernel"]["scale"].get_value() == jax.P(*names)
    jnn.dequantize_model(layer)
    assert layer.kernel.get_metadata("out_sharding") == ("embed", "mlp")


def test_vectors_and_codes_packed_along_out_have_names_where_axes_are_whole(key):
    metadata = {"out_sharding": jax.P("embed"), "eager_sharding": False}
    layer = jnn.quantize_model(nnx.Linear(6, 64, kernel_metadata=metadata, rngs=nnx.Rngs(0)), Symmetric(4), key=key)
    assert layer.kernel.template.codes.axis == 1
    assert layer.kernel.words.get_metadata("out_sharding") == ("embed", None, None)
    jnn.dequantize_model(layer)
    assert layer.kernel.get_metadata("out_sharding") == ("embed", None)
    subspaces = jnn.Quantized(DECODERS["product, per subspace"], metadata | {"out_sharding": ("embed", "mlp")})
    assert subspaces.words.get_metadata("out_sharding") == (None, "mlp", None)
    assert subspaces.vectors.get_metadata("out_sharding") == (None,) * 5  # six subspaces, 24 inputs


def test_annotated_arrays_are_sharded_in_a_mesh(key):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        layer = jnn.Linear(128, 24, method=Symmetric(bits=4), kernel_init=init, rngs=nnx.Rngs(0))
        assert layer.kernel.words[...].sharding.mesh == mesh
        layer = jnn.Linear(128, 24, method=Symmetric(4), training=StraightThrough(), kernel_init=init, rngs=nnx.Rngs(0))
        jnn.harden_model(nnx.List([layer]), key=key)
        assert layer.kernel.words.get_metadata("out_sharding") == (None, "model", None)


def test_adamw_reaches_codebooks_and_not_codes(model, x, key):
    jnn.quantize_model(model, KMeans(bits=3), key=key)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)
    codes = jax.tree.map(np.asarray, nnx.state(model, jnn.Codes))
    start, traces = np.asarray(model.head.kernel.vectors[...]), []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(step(model, optimizer, x)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert len(traces) == 1
    assert len(jax.tree.leaves(codes)) == 3
    assert_same(nnx.state(model, jnn.Codes), codes)
    assert np.abs(model.head.kernel.vectors[...] - start).min() > 0
    targets = jnn.params_of(Network(nnx.Rngs(0)))
    jnn.load_params(model, jaxvq.reassign(jnn.params_of(model), targets))
    assert not np.array_equal(model.head.kernel.words[...], codes["head"]["kernel"]["words"][...])
    step(model, optimizer, x)
    assert len(traces) == 1  # new codes of the same shapes compile nothing


def test_rounded_model_is_its_hardened_self(model, x, key):
    settings = {"training": StraightThrough(learned_step=True), "act_bits": 4, "act_momentum": 0.9}
    jnn.quantize_model(model, Symmetric(bits=4), key=key, **settings)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    model.train()
    losses = [float(step(model, optimizer, x)) for _ in range(20)]
    assert losses[-1] < losses[0]
    model.eval()
    ranges, outputs = np.asarray(model.head.input_range[...]), model(x)
    jnn.harden_model(model, key=key)
    np.testing.assert_array_equal(model(x), outputs)
    assert type(model.head.kernel) is jnn.Quantized
    np.testing.assert_array_equal(model.head.input_range[...], ranges)
    assert model.head.deterministic is not False
    jnn.dequantize_model(model)
    assert not hasattr(model.head, "input_range")
    assert not hasattr(model.head, "act_bits")


def test_files(model, x, key, tmp_path):
    jnn.quantize_model(model, KMeans(bits=3), key=key)
    model.norm.mean[...] = jnp.arange(12.0)
    outputs, path = model(x), tmp_path / "model.safetensors"
    jaxvq.save(path, jnn.params_of(model))
    params = jaxvq.load(path)
    assert jaxvq.report(None, params).nbytes < path.stat().st_size
    for fresh in (Network(nnx.Rngs(5)), jnn.quantize_model(Network(nnx.Rngs(5)), Product(bits=2), key=key)):
        fresh.eval()
        assert jnn.load_params(fresh, params) is fresh
        np.testing.assert_array_equal(fresh(x), outputs)
        assert type(fresh.layers[0]) is jnn.Linear


def test_loading_into_a_model_in_training(x, key):
    def make(seed):
        return jnn.quantize_model(
            Network(nnx.Rngs(seed)), Symmetric(bits=3), key=key, training=StraightThrough(learned_step=True)
        )

    trained = make(0)
    trained.head.kernel.learned.scale[...] *= 2
    params = jnn.params_of(trained)
    assert list(params["head"]["kernel"]) == ["learned", "weight"]
    other = jnn.load_params(make(1), params)  # as it was
    trained.eval()
    other.eval()
    np.testing.assert_array_equal(other(x), trained(x))
    floats = jnn.params_of(Network(nnx.Rngs(0)))  # from float parameters: training begins anew
    other = jnn.load_params(make(1), floats)
    np.testing.assert_array_equal(other.head.kernel.weight[...], floats["head"]["kernel"])
    np.testing.assert_allclose(2 * other.head.kernel.learned.scale[...], trained.head.kernel.learned.scale[...])
    hardened = jnn.params_of(jnn.harden_model(trained, key=key))
    other = jnn.load_params(make(1), hardened)
    other.eval()
    np.testing.assert_array_equal(other(x), trained(x))
    other = jnn.load_params(trained, floats)
    assert type(other.head.kernel) is nnx.Param


def test_what_a_file_holds():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=True, rngs=rngs)
            self.attention.init_cache((1, 3, 4))
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.seen = nnx.Intermediate(jnp.ones(3))
            self.steps = nnx.Variable(3)
            self.mask = jnp.ones(3)

    model = Model(nnx.Rngs(0))
    params = jnn.params_of(model)
    assert sorted(params) == ["attention", "norm", "steps"]
    assert sorted(params["norm"]) == ["bias", "mean", "scale", "var"]
    assert sorted(params["attention"]) == ["key", "out", "query", "value"]
    assert jnn.load_params(model, params | {"steps": np.int32(7)}).steps[...] == 7


def test_orbax_restores_exactly(tmp_path, x, key):
    orbax = pytest.importorskip("orbax.checkpoint")

    def make(seed):
        settings = {"training": QuantNoise(0.5), "act_bits": 4, "act_momentum": 0.9}
        codes = jnn.Linear(12, 12, use_bias=False, method=Uniform(bits=3), rngs=nnx.Rngs(seed))
        floats = jnn.Linear(12, 6, use_bias=False, method=Symmetric(bits=4), **settings, rngs=nnx.Rngs(seed))
        model = nnx.Sequential(codes, floats)
        return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))

    trained, other = make(0), make(1)
    step(*trained)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(trained))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / "state", nnx.state(other)))
    for _ in range(2):
        for one, two in zip(jax.tree.leaves(nnx.state(other)), jax.tree.leaves(nnx.state(trained)), strict=True):
            assert one.dtype == two.dtype
            assert bool(jnp.all(one == two))
        step(*trained)
        step(*other)


REFUSED = [
    ({"model": 3}, TypeError, "`model` must be an nnx.Module, got int"),
    ({"key": 0}, TypeError, "`key` must be a random key"),
    ({"spec": "KMeans"}, TypeError, "`spec` must be a Spec"),
    ({"spec": Rule("nowhere", FINE)}, ValueError, "matches no path"),
    ({"training": "yes"}, TypeError, "`training` must be a way to train"),
    ({"training": SoftAssignment()}, ValueError, "head/kernel: `SoftAssignment` trains KMeans palettes"),
    ({"training": StraightThrough(), "stats": {}}, ValueError, "`stats` must be None with `training`"),
    ({"act_bits": 12}, ValueError, "`act_bits` must be a whole number from 1 to 8"),
    ({"act_momentum": 0.5}, ValueError, "`act_momentum` must come with `act_bits`"),
    ({"stats": {"head/bias": None}}, ValueError, "head/bias: `stats` must name leaves"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(model, key, changed, kind, message):
    arguments = {"model": model, "spec": FINE, "key": key} | changed
    with pytest.raises(kind, match=message):
        jnn.quantize_model(arguments.pop("model"), arguments.pop("spec"), **arguments)
    assert type(model.layers[0]) is nnx.Linear


@pytest.mark.parametrize("training", [None, StraightThrough()])
def test_damaged_weights_leave_the_model_as_it_was(model, key, training):
    model.head.kernel[...] = model.head.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="head/kernel: the weight must be finite, got 1 NaN"):
        jnn.quantize_model(model, Symmetric(bits=4), key=key, training=training)
    assert {type(layer.kernel) for layer in (*model.layers, model.head)} == {nnx.Param}
    model.head.kernel[...] = jnp.ones((12, 6))
    jnn.quantize_model(model, Symmetric(bits=4), key=key, training=StraightThrough())
    model.head.kernel.weight[...] = model.head.kernel.weight[...].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match="head/kernel: the weight must be finite, got 1 NaN"):
        jnn.harden_model(model, key=key)
    assert type(model.layers[0].kernel) is jnn.Latent


def test_a_weight_in_a_tuple_is_refused(key):
    class Model(nnx.Module):
        def __init__(self):
            self.pair = nnx.data((nnx.Param(jnp.ones((4, 4))), nnx.Linear(4, 4, rngs=nnx.Rngs(0))))

    with pytest.raises(ValueError, match=r"pair: a weight must be in a module.*got a tuple; use nnx.List"):
        jnn.quantize_model(Model(), FINE, key=key)
    model = jnn.quantize_model(Model(), Rule("pair/1/kernel", FINE), key=key)
    assert type(model.pair[1]) is jnn.Linear


def test_one_path_for_two_weights_is_refused(key):
    model = nnx.Dict({"a/b": nnx.Param(jnp.ones((4, 4))), "a": nnx.Dict({"b": nnx.Param(jnp.ones((4, 4)))})})
    with pytest.raises(ValueError, match="a/b: two variables have this path"):
        jnn.quantize_model(model, FINE, key=key)


def changed(params, path, value):
    """A copy of nested dictionaries with another leaf; None removes it."""
    first, *rest = path
    inner = {k: v for k, v in params.items() if k != first}
    if rest:
        return inner | {first: changed(params.get(first, {}), rest, value)}
    return inner if value is None else inner | {first: value}


@pytest.mark.parametrize(
    ("path", "value", "kind", "message"),
    [
        (("head", "kernel"), None, ValueError, r"head/kernel: `params` must have every leaf.*\(1 are missing\)"),
        (("norm", "mean"), None, ValueError, "norm/mean: `params` must have every leaf"),
        (("tail", "kernel"), jnp.ones(3), ValueError, "tail/kernel: `params` must have leaves of the model alone"),
        (
            ("head", "kernel"),
            jnp.ones((6, 12)),
            ValueError,
            r"head/kernel: .* float32 \(12, 6\) here, got float32 \(6, 12",
        ),
        (("head", "kernel"), jnp.ones((12, 6), int), ValueError, "head/kernel: .* here, got int32"),
        (("head", "kernel"), "text", TypeError, "head/kernel: `params` must hold arrays, got str"),
        (("head",), jnp.ones((12, 6)), ValueError, "head/kernel: `params` must have every leaf"),
    ],
)
def test_foreign_trees_are_refused(model, x, path, value, kind, message):
    before, params = model(x), jnn.params_of(Network(nnx.Rngs(1)))
    with pytest.raises(kind, match=message):
        jnn.load_params(model, changed(params, path, value))
    np.testing.assert_array_equal(model(x), before)


def test_quantized_leaves_in_wrong_places_are_refused(model, key):
    params, one = jnn.params_of(model), jaxvq.quantize_params(jnp.ones((1, 12)), Uniform(bits=2), key=key)
    row = jaxvq.quantize_params({"m": jnp.ones(12)}, Rule("m", Uniform(bits=2)), key=key)["m"]
    with pytest.raises(ValueError, match="norm/mean: `params` must have an array here, got a quantized weight"):
        jnn.load_params(model, changed(params, ("norm", "mean"), row))
    with pytest.raises(ValueError, match=r"head/kernel: .* here, got float32 \(1, 12\)"):
        jnn.load_params(model, changed(params, ("head", "kernel"), one))
    split = nnx.split_rngs(splits=2)(lambda rngs: nnx.clone(rngs))(nnx.Rngs(0))
    stack = nnx.vmap(lambda rngs: nnx.Linear(4, 4, use_bias=False, rngs=rngs))(split)
    whole = jaxvq.quantize_params({"kernel": stack.kernel[...]}, Uniform(bits=2), key=key)
    message = "kernel: `params` must have a weight quantized slice by slice here, in slices of 2 axes"
    with pytest.raises(ValueError, match=re.escape(message)):
        jnn.load_params(stack, whole)
