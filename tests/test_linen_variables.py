"""Unmodified Flax models on quantized weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DECODERS
from flax.core import freeze

import jaxvq
from jaxvq import KMeans, Rule, Symmetric, linen
from jaxvq.array import is_quantized

METHOD = Symmetric(bits=4, per="channel")


def inputs_of(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def converted(model, *args, spec=METHOD):
    """Variables with quantized weights, and the float variables that they stand for."""
    variables = dict(jax.jit(model.init)(jax.random.key(0), *args))
    params = jax.jit(lambda p: jaxvq.quantize_params(p, spec, key=jax.random.key(1)))(variables["params"])
    assert any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
    return {**variables, **linen.to_variables(params)}, {**variables, "params": jaxvq.dequantize_params(params)}


class Tied(nn.Module):
    """Every layer that has a weight, one of them used twice."""

    @nn.compact
    def __call__(self, ids, train=False):
        embed = nn.Embed(12, 8)
        x = embed(ids)
        x = nn.MultiHeadDotProductAttention(2)(x)
        x = nn.Conv(8, (3,))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.ConvTranspose(8, (3,), transpose_kernel=True)(x)
        x = nn.ConvLocal(8, (3,))(x)
        x = nn.DenseGeneral((2, 4))(x)
        x = nn.Einsum((2, 4, 8), "abcd,cde->abe")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8)(x))
        return embed.attend(x)

    def double(self, ids):
        return 2 * self(ids)


IDS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])


@pytest.fixture(scope="module")
def tied():
    return converted(Tied(), IDS)


def test_every_layer_of_flax(tied):
    variables, floats = tied
    run = jax.jit(functools.partial(linen.apply, Tied()))
    close(run(variables, IDS), jax.jit(Tied().apply)(floats, IDS))


def test_arguments_of_apply_pass_through(tied):
    variables, floats = tied
    rngs = {"dropout": jax.random.key(5)}
    options = {"train": True, "rngs": rngs, "mutable": ["batch_stats"]}
    got, updates = linen.apply(Tied(), variables, IDS, **options)
    expected, same = Tied().apply(floats, IDS, **options)
    close(got, expected)
    assert list(updates) == ["batch_stats"]
    jax.tree.map(close, updates, same)
    close(linen.apply(Tied(), variables, IDS, method="double"), Tied().apply(floats, IDS, method="double"))
    _, found = linen.apply(Tied(), variables, IDS, capture_intermediates=True, mutable=["intermediates"])
    assert found["intermediates"]["Dense_0"]["__call__"][0].shape == (2, 4, 8)


@pytest.mark.parametrize("mutable", [True, ["params"], "params"])
def test_mutable_params_come_back_in_halves(tied, mutable):
    variables, _ = tied
    _, updates = jax.jit(lambda v: linen.apply(Tied(), freeze(v), IDS, mutable=mutable))(variables)
    assert set(updates) == ({"params", "codes", "batch_stats"} if mutable is True else {"params", "codes"})
    assert jax.tree.structure(updates["params"]) == jax.tree.structure(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, updates["codes"], variables["codes"])


def test_bound_modules(tied):
    variables, floats = tied
    close(Tied().bind(linen.join(variables))(IDS), Tied().apply(floats, IDS))


def test_there_and_back(tied, tmp_path):
    variables, floats = tied
    params = linen.from_variables(variables)
    again = linen.to_variables(params)
    assert jax.tree.structure(again) == jax.tree.structure({name: variables[name] for name in ("params", "codes")})
    back = linen.dequantize(variables)
    assert set(back) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, back, floats)
    jaxvq.save(tmp_path / "model.safetensors", params)
    loaded = jaxvq.load(tmp_path / "model.safetensors")
    assert jaxvq.report(floats["params"], loaded).nbytes < jaxvq.report(floats["params"], loaded).original_nbytes
    run = jax.jit(functools.partial(linen.apply, Tied()))
    stored = {"batch_stats": variables["batch_stats"], **linen.to_variables(loaded)}
    np.testing.assert_array_equal(run(stored, IDS), run(variables, IDS))


def test_codes_hold_quantized_leaves_only(key):
    params = {"a": {"kernel": jnp.ones((4, 4)), "steps": jnp.arange(3)}, "b": [inputs_of(4, 4)], "c": jnp.ones(2)}
    quantized = jaxvq.quantize_params(params, Rule(r"a/kernel|b/0", METHOD), key=key)
    variables = linen.to_variables(quantized)
    assert jax.tree.map(is_quantized, variables["codes"], is_leaf=is_quantized) == {
        "a": {"kernel": True},
        "b": {"0": True},
    }
    assert all(leaf.dtype == jnp.uint32 for leaf in jax.tree.leaves(variables["codes"]))
    assert "steps" in variables["params"]["a"]
    back = linen.from_variables(variables)
    assert jax.tree.structure(back) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, back, quantized)


def test_integer_codebooks_are_codes(key):
    quantized = jaxvq.quantize_params(inputs_of(8, 8), KMeans(bits=2, codebook_dtype="int8"), key=key)
    variables = linen.to_variables({"kernel": quantized})
    assert [leaf.dtype for leaf in jax.tree.leaves(variables["params"])] == [jnp.float32]
    assert variables["codes"]["kernel"].decoder.vectors.dtype == jnp.int8


def test_names_of_boxes_go_to_the_parts(key):
    init = nn.with_partitioning(nn.initializers.normal(), ("rows", "columns"))
    params = nn.Dense(8, kernel_init=init).init(key, jnp.ones((1, 16)))["params"]
    params = {"stack": jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)}
    params["stack"]["kernel"] = params["stack"]["kernel"].add_axis(0, {nn.meta.PARTITION_NAME: "layers"})
    quantized = jaxvq.quantize_params(params, Rule(".*kernel", METHOD, stacked=1), key=key)
    variables = linen.to_variables(quantized)
    specs = nn.get_partition_spec(variables)
    axes = jax.sharding.PartitionSpec
    assert specs["codes"]["stack"]["kernel"].codes.words == axes("layers", None, "columns", None)
    assert specs["params"]["stack"]["kernel"].decoder.scale == axes("layers", None, "columns", None)
    assert linen.from_variables(variables)["stack"]["kernel"].shape == (2, 16, 8)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(8)(x)), None


class Stack(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes = {"params": self.axis}
        scan = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(scan(name="blocks")(x, None)[0])


STACKED = [Rule("blocks/.*kernel", METHOD, stacked=1), Rule(".*kernel", METHOD)]


def test_stacked_layers_decode_inside_the_scan():
    x = inputs_of(2, 8)
    variables, floats = converted(Stack(), x, spec=STACKED)
    close(linen.apply(Stack(), variables, x), Stack().apply(floats, x))
    program = str(jax.make_jaxpr(lambda v: linen.apply(Stack(), v, x))(variables))
    assert "scan" in program
    assert "f32[8,8]" in program
    assert "f32[3,8,8]" not in program

    def loss(apply, params, rest):
        return jnp.sum(apply({**rest, "params": params}, x) ** 2)

    gradient = jax.jit(jax.grad(lambda p: loss(functools.partial(linen.apply, Stack()), p, variables)))
    step = gradient(variables["params"])["blocks"]["Dense_0"]["kernel"].decoder.scale
    through = jax.grad(lambda p: loss(Stack().apply, p, floats))(floats["params"])["blocks"]["Dense_0"]["kernel"]
    array = linen.from_variables(variables)["blocks"]["Dense_0"]["kernel"]
    levels = np.asarray(array.unpack(), np.float32)[..., 0] - 7
    close(step[:, 0, :, 0], (np.asarray(through) * levels).sum(axis=1))


def test_layers_stacked_elsewhere_are_refused():
    variables, _ = converted(Stack(), inputs_of(2, 8), spec=STACKED)
    with pytest.raises(ValueError, match="must be stacked along axis 0, got 1"):
        linen.apply(Stack(axis=1), variables, inputs_of(2, 8))


def test_recurrent_cells_and_ensembles():
    sequence = inputs_of(2, 5, 8)
    model = nn.RNN(nn.OptimizedLSTMCell(4))
    variables, floats = converted(model, sequence)
    close(linen.apply(model, variables, sequence), model.apply(floats, sequence))
    ensemble = nn.vmap(nn.Dense, in_axes=None, axis_size=3, variable_axes={"params": 0}, split_rngs={"params": True})(4)
    variables, floats = converted(ensemble, sequence, spec=Rule("kernel", METHOD, stacked=1))
    close(linen.apply(ensemble, variables, sequence), ensemble.apply(floats, sequence))


class LowRank(nn.Module):
    """A module that adds to another in its place."""

    base: nn.Module

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        return self.base(x) + x @ self.param("low", nn.initializers.normal(), (8, 6))


def test_shared_scopes_and_jitted_modules():
    for model in (LowRank(nn.Dense(6)), nn.jit(nn.Dense)(6)):
        variables, floats = converted(model, inputs_of(2, 8), spec=Rule("kernel", METHOD))
        close(linen.apply(model, variables, inputs_of(2, 8)), model.apply(floats, inputs_of(2, 8)))


def test_gradient_is_that_of_codebooks_alone():
    array, model, x = DECODERS["product, per subspace"], nn.Dense(6, use_bias=False), inputs_of(3, 24)
    variables = linen.to_variables({"kernel": array})

    def loss(params):
        return jnp.sum(linen.apply(model, {**variables, "params": params}, x) ** 2)

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])
    kernel = array.dequantize()
    dense = np.asarray(2 * x.T @ (x @ kernel))
    codes = np.asarray(array.unpack())[:, :, 0]
    expected = np.zeros((6, 7, 4))
    for group in range(6):
        for out in range(6):
            expected[group, codes[group, out]] += dense[4 * group : 4 * group + 4, out]
    np.testing.assert_allclose(gradient["kernel"].decoder.vectors[:, 0, 0], expected, rtol=1e-4, atol=1e-3)


def test_compiles_once():
    model, x = nn.Dense(4), inputs_of(3, 8)
    variables, _ = converted(model, x)
    traces = []

    @jax.jit
    def step(variables):
        traces.append(None)
        params = variables["params"]
        gradient = jax.grad(lambda p: jnp.sum(linen.apply(model, {**variables, "params": p}, x)))(params)
        return {**variables, "params": jax.tree.map(lambda a, b: a - 0.1 * b, params, gradient)}

    for _ in range(3):
        variables = step(variables)
    assert len(traces) == 1


def test_halves_that_do_not_belong_together_are_refused():
    x = inputs_of(3, 8)
    variables, floats = converted(nn.Dense(4), x)
    with pytest.raises(ValueError, match=r'^kernel: "codes" must have the codes of the weight, got none'):
        linen.apply(nn.Dense(4), {"params": variables["params"]}, x)
    with pytest.raises(ValueError, match=r'^kernel: "params" must have the other half of the weight'):
        linen.apply(nn.Dense(4), {**floats, "codes": variables["codes"]}, x)
    other, _ = converted(nn.Dense(4), x, spec=Symmetric(bits=2))
    with pytest.raises(ValueError, match=r'^kernel: "params" and "codes" must have the halves of one weight'):
        linen.from_variables({**variables, "codes": other["codes"]})
