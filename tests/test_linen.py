"""The linen layers against Flax's own, on the weights that their codes stand for."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DECODERS

import jaxvq
from jaxvq import KMeans, Product, QuantNoise, SoftAssignment, StraightThrough, Symmetric, Uniform, linen
from jaxvq.array import is_quantized


def inputs_of(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def both(layer, inputs, **kwargs):
    """What a layer returns, and what Flax's own does on the weights that its codes stand for."""
    variables = layer.init(jax.random.key(0), inputs)
    own = {"method", "training", "act_bits", "act_momentum", "parent", "name"}
    fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.init and f.name not in own}
    flax = getattr(nn, type(layer).__name__)(**fields)
    return layer.apply(variables, inputs, **kwargs), flax.apply(linen.dequantize(variables), inputs, **kwargs)


def check_same(got, expected):
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        KMeans(bits=2, codebook_dtype="int8"),
        Uniform(bits=3),
        Symmetric(bits=4, per=8),
        Product(bits=2, dim=3, codebook_dtype="bfloat16"),
    ],
    ids=str,
)
def test_every_method_makes_a_layer(method):
    check_same(*both(linen.Dense(6, method=method), inputs_of(4, 10)))


@pytest.mark.parametrize(
    "options",
    [
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
        {"precision": jax.lax.Precision.HIGHEST},
        {"precision": "highest"},
        {"kernel_init": nn.initializers.normal(3.0), "bias_init": nn.initializers.ones},
        {"dot_general": lambda *args, **kwargs: 2 * jax.lax.dot_general(*args, **kwargs)},
        {"dot_general_cls": lambda: jax.lax.dot_general},
        {"promote_dtype": lambda *args, dtype, **kwargs: [jnp.asarray(a, jnp.float16) for a in args]},
    ],
)
@pytest.mark.parametrize("shape", [(4, 10), (2, 3, 10)])
def test_dense_arguments(options, shape):
    check_same(*both(linen.Dense(6, method=Symmetric(bits=3), **options), inputs_of(*shape)))


@pytest.mark.parametrize("make", [lambda: np.arange(10), lambda: inputs_of(2, 10).astype(jnp.bfloat16)])
def test_dense_takes_the_inputs_that_flax_takes(make):
    check_same(*both(linen.Dense(6, method=Symmetric(bits=3)), make()))


@pytest.mark.parametrize(
    "options",
    [
        {"features": (2, 3)},
        {"features": 4, "axis": (-2, -1)},
        {"features": 4, "batch_dims": (0,), "use_bias": False},
    ],
    ids=str,
)
def test_dense_general_arguments(options):
    check_same(*both(linen.DenseGeneral(method=Symmetric(bits=2), **options), inputs_of(2, 5, 6)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "VALID", "strides": 2, "use_bias": False},
        {"padding": "CIRCULAR"},
        {"padding": "REFLECT"},
        {"padding": ((1, 0), (2, 1)), "kernel_dilation": 2},
        {"feature_group_count": 2, "dtype": jnp.bfloat16},
        {"mask": jnp.tril(jnp.ones((3, 2, 4, 6)))},
        {"input_dilation": 2, "padding": 1},
        {"conv_general_dilated": lambda *args, **kwargs: -jax.lax.conv_general_dilated(*args, **kwargs)},
    ],
    ids=lambda options: ",".join(options),
)
def test_conv_arguments(options):
    layer = linen.Conv(6, (3, 2), method=Symmetric(bits=2, per="channel"), **options)
    check_same(*both(layer, inputs_of(2, 5, 6, 4)))


def test_conv_in_one_dimension_without_a_batch():
    layer = linen.Conv(6, 3, padding="CAUSAL", method=Symmetric(bits=3))
    check_same(*both(layer, inputs_of(7, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transpose_kernel": True, "strides": (2, 2)},
        {"padding": "CIRCULAR", "strides": (2, 1)},
        {"mask": jnp.tril(jnp.ones((3, 2, 4, 6))), "padding": "VALID", "kernel_dilation": (2, 1)},
    ],
    ids=lambda options: ",".join(options),
)
def test_conv_transpose_arguments(options):
    layer = linen.ConvTranspose(6, (3, 2), method=Symmetric(bits=2, per="channel"), **options)
    check_same(*both(layer, inputs_of(2, 5, 6, 4)))


def test_transposed_kernels_have_a_palette_for_each_output_feature():
    layer = linen.ConvTranspose(6, (3,), transpose_kernel=True, method=Symmetric(bits=2, per="channel"))
    kernel = layer.init(jax.random.key(0), inputs_of(5, 4))["params"]["kernel"]
    assert kernel.decoder.scale.shape == (1, 6, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": jnp.bfloat16}, {"promote_dtype": lambda *args, **kwargs: [jnp.asarray(a, "float16") for a in args]}],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("method", [Symmetric(bits=2, per="channel"), KMeans(bits=2)], ids=str)
def test_embed_arguments(options, method):
    layer = linen.Embed(9, 4, method=method, **options)
    ids = jnp.array([[3, 0, -1], [8, 9, -10]])
    got, expected = both(layer, ids)
    assert bool(jnp.isnan(got).any())
    check_same(got, expected)
    variables = layer.init(jax.random.key(0), ids)
    query = inputs_of(2, 4)
    attended = nn.Embed(9, 4, **options).apply(linen.dequantize(variables), query, method="attend")
    check_same(layer.apply(variables, query, method="attend"), attended)
    table = linen.dequantize(variables)["params"]["embedding"]
    np.testing.assert_array_equal(layer.bind(variables).embedding, table)


def test_embed_of_one_row_broadcasts():
    check_same(*both(linen.Embed(1, 4, method=Symmetric(bits=2)), jnp.array([3, 0])))


def test_embed_refuses_ids_that_are_no_whole_numbers():
    layer = linen.Embed(9, 4, method=Symmetric(bits=2))
    with pytest.raises(ValueError, match="must be an integer"):
        layer.init(jax.random.key(0), jnp.ones(3))


LAYERS = {
    "Dense": (linen.Dense(6), nn.Dense(6), (4, 10)),
    "DenseGeneral": (linen.DenseGeneral((2, 3)), nn.DenseGeneral((2, 3)), (4, 10)),
    "Conv": (linen.Conv(6, (3, 3)), nn.Conv(6, (3, 3)), (2, 5, 5, 4)),
    "ConvTranspose": (linen.ConvTranspose(6, (3, 3)), nn.ConvTranspose(6, (3, 3)), (2, 5, 5, 4)),
    "Embed": (linen.Embed(10, 6), nn.Embed(10, 6), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_flax_and_quantize_params_would(name, key):
    layer, flax, shape = LAYERS[name]
    inputs = jnp.arange(5) if shape is None else inputs_of(*shape)
    floats = flax.init(key, inputs)
    plain = layer.init(key, inputs)
    assert jax.tree.structure(plain) == jax.tree.structure(floats)
    np.testing.assert_array_equal(layer.apply(floats, inputs), flax.apply(floats, inputs))
    method = Symmetric(bits=2, per="channel")
    rule = jaxvq.Rule("kernel|embedding", method)
    converted = linen.to_variables(jaxvq.quantize_params(floats["params"], rule, key=key))
    started = layer.clone(method=method).init(key, inputs)
    assert jax.tree.structure(started) == jax.tree.structure(converted)
    jax.tree.map(np.testing.assert_array_equal, started, converted)


@pytest.mark.parametrize("name", LAYERS)
def test_runs_on_converted_variables_of_another_method(name, key):
    layer, flax, shape = LAYERS[name]
    inputs = jnp.arange(5) if shape is None else inputs_of(*shape)
    rule = jaxvq.Rule("kernel|embedding", Uniform(bits=3))
    params = jaxvq.quantize_params(flax.init(key, inputs)["params"], rule, key=key)
    variables = linen.to_variables(params)
    expected = flax.apply({"params": jaxvq.dequantize_params(params)}, inputs)
    coded = layer.clone(method=KMeans(bits=2))
    check_same(coded.apply(variables, inputs), expected)
    for model in (layer, coded, layer.clone(method=Symmetric(bits=2), training=StraightThrough())):
        check_same(linen.apply(model, variables, inputs), expected)
        check_same(linen.apply(model, {"params": params}, inputs), expected)


def test_fields_come_after_those_of_flax():
    layer = linen.Conv(8, (3, 3), 2, method=KMeans(bits=2))
    assert (layer.features, layer.kernel_size, layer.strides) == (8, (3, 3), 2)
    assert hash(layer) == hash(layer.clone())


def test_clusters_only_once(monkeypatch, key):
    layer = linen.Dense(6, method=KMeans(bits=2))
    soft = linen.Dense(6, method=KMeans(bits=2), training=SoftAssignment())
    inputs = inputs_of(4, 10)
    variables, latents = layer.init(key, inputs), soft.init(key, inputs)

    def refuse(*args, **kwargs):
        raise AssertionError("clusters again")

    monkeypatch.setattr(KMeans, "fit", refuse)
    monkeypatch.setattr("jaxvq._fit.palettes", refuse)
    assert layer.apply(variables, inputs).shape == (4, 6)
    assert jax.jit(layer.apply)(variables, inputs).shape == (4, 6)
    assert soft.apply(latents, inputs, mutable=["quantization"])[0].shape == (4, 6)
    with pytest.raises(AssertionError, match="clusters again"):
        layer.init(key, inputs)


def test_gradient_of_a_centroid_is_the_sum_over_its_weights():
    array = DECODERS["palette per channel"]
    variables = linen.to_variables({"kernel": array})
    layer = linen.Dense(6, use_bias=False, method=KMeans(bits=2, per="channel"))
    inputs, out = inputs_of(4, 24), inputs_of(4, 6)

    def loss(params):
        return jnp.sum(out * layer.apply({**variables, "params": params}, inputs))

    gradient = jax.grad(loss)(variables["params"])["kernel"]
    assert gradient.codes.words is None
    codes = np.asarray(array.unpack())[:, :, 0]
    per_weight = np.asarray(inputs).T @ np.asarray(out)
    expected = np.zeros((6, 4))
    for row in range(24):
        for column in range(6):
            expected[column, codes[row, column]] += per_weight[row, column]
    np.testing.assert_allclose(gradient.decoder.vectors[0, :, 0, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_intermediates_and_interceptors_see_a_layer_once(key):
    seen = []

    def count(call, args, kwargs, context):
        seen.append((type(context.module).__name__, context.method_name))
        return call(*args, **kwargs)

    for layer, inputs in [
        (linen.Conv(2, (3,), method=Symmetric(bits=2), act_bits=4), inputs_of(1, 5, 3)),
        (linen.Dense(2, method=Symmetric(bits=2), dot_general=jax.lax.dot_general), inputs_of(1, 5)),
        (linen.Embed(4, 4, promote_dtype=lambda *args, **_: args), jnp.arange(3)),
    ]:
        variables = layer.init(key, inputs)
        seen.clear()
        with nn.intercept_methods(count):
            out, found = layer.apply(variables, inputs, capture_intermediates=True, mutable=["intermediates"])
        assert seen.count((type(layer).__name__, "__call__")) == 1
        (captured,) = found["intermediates"]["__call__"]
        np.testing.assert_array_equal(captured, out)


COLLECTIONS = ("params", "codes", "quantization")
AXES = jax.sharding.PartitionSpec


@pytest.mark.parametrize("annotate", [nn.with_partitioning, nn.with_logical_partitioning])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"method": KMeans(bits=2, per="channel")},
            [[AXES(None, "columns", None, None, None)], [AXES(None, "columns", None)], []],
        ),
        (
            {"method": Product(bits=3, dim=2, codebooks="subspace")},
            [[AXES("rows", None, None, None, None)], [AXES(None, "columns", None)], []],
        ),
        ({"method": Symmetric(bits=4, per=16)}, [[AXES(None, "columns", None)], [AXES(None, "columns", None)], []]),
        ({"method": Uniform(bits=4)}, [2 * [AXES(None, None, None)], [AXES(None, "columns", None)], []]),
        (
            {"method": Symmetric(bits=2, per="channel"), "training": StraightThrough(learned_step=True)},
            [[AXES("rows", "columns"), AXES(None, "columns", None)], [], []],
        ),
        (
            {"method": KMeans(bits=2, per="channel"), "training": SoftAssignment()},
            [[AXES("rows", "columns")], [], [AXES(None, "columns", None, None, None)]],
        ),
    ],
    ids=str,
)
def test_axis_names_carry_over(annotate, options, expected, key):
    init = annotate(nn.initializers.normal(), ("rows", "columns"))
    layer = linen.Dense(40, use_bias=False, kernel_init=init, **options)
    shapes = jax.eval_shape(layer.init, key, jnp.ones((1, 64)))
    specs = nn.get_partition_spec(shapes)
    assert [jax.tree.leaves(specs.get(name, {})) for name in COLLECTIONS] == expected
    out = jax.eval_shape(lambda v: layer.apply(v, jnp.ones((1, 64)), mutable=["quantization"]), shapes)
    assert out[0].shape == (1, 40)


def test_axis_names_along_a_packed_output_axis(key):
    init = nn.with_partitioning(nn.initializers.normal(), ("rows", "columns"))
    layer = linen.Dense(64, use_bias=False, kernel_init=init, method=Symmetric(bits=1))
    codes = layer.init(key, jnp.ones((1, 3)))["codes"]["kernel"].codes
    assert codes.axis == 1
    assert codes.words.names == ("rows", None, None)


def test_axis_names_hold_on_a_mesh(key):
    init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    layer = linen.Dense(8, kernel_init=init, method=Symmetric(bits=2, per="channel"))
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        variables = jax.jit(layer.init)(key, jnp.ones((1, 16)))
        out = jax.jit(layer.apply)(variables, jnp.ones((1, 16)))
        np.testing.assert_array_equal(jax.jit(lambda v: linen.apply(layer, v, jnp.ones((1, 16))))(variables), out)
    assert out.shape == (1, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "kmeans"}, TypeError, "`method` must be a method such as KMeans"),
        ({"method": KMeans(bits=2), "training": "ste"}, TypeError, "`training` must be a way to train"),
        ({"training": StraightThrough()}, ValueError, "`training` must come with a `method`"),
        ({"method": KMeans(bits=2), "training": StraightThrough()}, ValueError, "trains Symmetric or Uniform weights"),
        ({"method": Product(bits=2), "training": SoftAssignment()}, ValueError, "trains KMeans palettes"),
        ({"act_bits": 9}, ValueError, "`act_bits` must be a whole number from 1 to 8, got 9"),
        ({"act_bits": True}, ValueError, "`act_bits` must be a whole number from 1 to 8, got True"),
        ({"act_bits": 2.0}, ValueError, "`act_bits` must be a whole number from 1 to 8, got 2.0"),
        ({"act_momentum": 0.9}, ValueError, "`act_momentum` must come with `act_bits`"),
        ({"act_bits": 4, "act_momentum": 1.0}, ValueError, "`act_momentum` must be at least 0 and below 1, got 1.0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, error, message, unchecked):
    for layer in (linen.Dense, linen.Embed):
        with pytest.raises(error, match=message):
            layer(4, features=4, **options) if layer is linen.Embed else layer(4, **options)


@pytest.mark.parametrize("training", [None, SoftAssignment()], ids=str)
def test_too_small_weights_are_refused_by_path(training, key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.Dense(2, method=KMeans(bits=4), training=training)(x)

    with pytest.raises(ValueError, match=r"^Dense_0/kernel: `k` must be at most .*, got 16"):
        Model().init(key, jnp.ones((1, 3)))


def test_variables_that_do_not_belong_to_the_layer_are_refused(key):
    layer, inputs = linen.Dense(6, method=Symmetric(bits=2)), inputs_of(4, 10)
    variables = layer.init(key, inputs)
    with pytest.raises(
        ValueError, match=r"^kernel: the weight of a layer with `method` and without `training` must be"
    ):
        layer.apply(nn.Dense(6).init(key, inputs), inputs)
    with pytest.raises(ValueError, match=r'^kernel: "codes" must have the codes of the weight, got none'):
        layer.apply({"params": variables["params"]}, inputs)
    with pytest.raises(ValueError, match=r"^kernel: the weight must have shape \(11, 6\), got \(10, 6\)"):
        layer.apply(variables, inputs_of(4, 11))
    other = linen.Dense(6, method=Symmetric(bits=3)).init(key, inputs)
    with pytest.raises(ValueError, match=r'^kernel: "params" and "codes" must have the halves of one weight'):
        layer.apply({**variables, "codes": other["codes"]}, inputs)
    with pytest.raises(nn.module.errors.ScopeParamNotFoundError):
        layer.apply({"params": {"bias": jnp.zeros(6)}}, inputs)


def test_noise_needs_a_key(key):
    layer = linen.Dense(6, method=KMeans(bits=2), training=QuantNoise())
    variables = layer.init(key, inputs_of(4, 10))
    with pytest.raises(ValueError, match="`key` must be a random key to train"):
        layer.apply(variables, inputs_of(4, 10), mutable=["quantization"])


def test_a_layer_used_twice_has_one_weight(key):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = linen.Dense(8, method=Symmetric(bits=2), act_bits=4, act_momentum=0.5)
            return layer(layer(x))

    inputs = inputs_of(2, 8)
    variables = Tied().init(key, inputs)
    assert len(jax.tree.leaves(variables["params"], is_leaf=is_quantized)) == 2
    out, updates = Tied().apply(variables, inputs, mutable=["quantization"])
    low, high = updates["quantization"]["Dense_0"]["input_range"]
    assert out.shape == (2, 8)
    assert low < 0 < high
