"""The layers of `jaxvq.nnx`, against Flax's own on the decoded kernel, and numpy."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxvq.nnx as jnn
from jaxvq import KMeans, Product, QuantNoise, SoftAssignment, StraightThrough, Symmetric, Uniform

ARGUMENTS = [
    ("Linear", (12, 20), {}, (5, 12)),
    ("Linear", (12, 20), {"use_bias": False}, (2, 5, 12)),
    ("Linear", (12, 20), {"dtype": jnp.bfloat16}, (5, 12)),
    ("Linear", (12, 20), {"param_dtype": jnp.bfloat16}, (5, 12)),
    ("Linear", (12, 20), {"precision": "highest"}, (5, 12)),
    ("Linear", (12, 20), {"preferred_element_type": jnp.float32, "dtype": jnp.bfloat16}, (5, 12)),
    ("Linear", (12, 20), {"dot_general": lambda x, w, *a, **k: lax.dot_general(2 * x, w, *a, **k)}, (5, 12)),
    ("Linear", (12, 20), {"promote_dtype": lambda args, dtype: [a if a is None else 2 * a for a in args]}, (5, 12)),
    ("Linear", (12, 20), {"kernel_init": nnx.initializers.normal(3.0), "bias_init": nnx.initializers.ones}, (5, 12)),
    ("Conv", (6, 8, (3, 3)), {}, (2, 7, 7, 6)),
    ("Conv", (6, 8, (3,)), {"padding": "CAUSAL", "use_bias": False}, (2, 7, 6)),
    ("Conv", (6, 8, (3, 3)), {"padding": "CIRCULAR", "strides": 2}, (2, 7, 7, 6)),
    ("Conv", (6, 8, (3, 3)), {"padding": "REFLECT", "dtype": jnp.bfloat16}, (7, 7, 6)),
    ("Conv", (6, 8, (3, 3)), {"padding": [(0, 1), (2, 0)], "kernel_dilation": 2}, (2, 3, 7, 7, 6)),
    ("Conv", (6, 8, (3, 3)), {"feature_group_count": 2}, (2, 7, 7, 6)),
    ("Conv", (6, 8, (2,)), {"mask": jnp.tril(jnp.ones((2, 6, 8)))}, (2, 7, 6)),
    ("ConvTranspose", (6, 8, (3, 3)), {"strides": (2, 2)}, (2, 4, 4, 6)),
    ("ConvTranspose", (6, 8, (3, 3)), {"strides": (2, 2), "transpose_kernel": True}, (2, 4, 4, 6)),
    ("ConvTranspose", (6, 8, (3,)), {"padding": "CIRCULAR", "mask": jnp.tril(jnp.ones((3, 6, 8)))}, (2, 4, 6)),
]


@pytest.fixture
def rngs():
    return nnx.Rngs(0)


def pair(name, args, kwargs, **ours):
    """A quantized layer, and Flax's own with its decoded weight."""
    layer = getattr(jnn, name)(*args, **kwargs, **ours, rngs=nnx.Rngs(0))
    flax_layer = getattr(nnx, name)(*args, **kwargs, rngs=nnx.Rngs(0))
    weight = "embedding" if name == "Embed" else "kernel"
    kernel = getattr(flax_layer, weight)
    kernel.set_value(layer.__getattribute__(weight)[...])
    return layer, flax_layer


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), ARGUMENTS)
def test_equals_flax_on_the_decoded_kernel(name, args, kwargs, shape, rng):
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    layer, flax_layer = pair(name, args, kwargs, method=Uniform(bits=3))
    assert isinstance(layer, getattr(nnx, name))
    assert len(np.unique(np.asarray(layer.kernel[...], np.float32))) == 8
    ours, theirs = layer(x), flax_layer(x)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), ARGUMENTS)
def test_without_a_method_it_is_flax(name, args, kwargs, shape, rng):
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    ours, theirs = (getattr(package, name)(*args, **kwargs, rngs=nnx.Rngs(0)) for package in (jnn, nnx))
    np.testing.assert_array_equal(ours(x), theirs(x))
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))


@pytest.mark.parametrize("kwargs", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
def test_embed(kwargs, rng):
    layer, flax_layer = pair("Embed", (30, 12), kwargs, method=Uniform(bits=4, per="channel"))
    ids = jnp.array([[0, 29, -1], [5, 30, 5]])
    np.testing.assert_array_equal(*(np.asarray(one(ids), np.float32) for one in (layer, flax_layer)))
    assert layer(ids).dtype == flax_layer(ids).dtype
    query = jnp.asarray(rng.normal(size=(4, 12)), jnp.float32)
    np.testing.assert_allclose(layer.attend(query), flax_layer.attend(query), rtol=1e-5, atol=1e-5)
    assert layer.attend(query).dtype == flax_layer.attend(query).dtype
    with pytest.raises(ValueError, match="must be an integer"):
        layer(jnp.ones(3))


def test_embed_decodes_only_the_rows(rngs):
    graph, state = nnx.split(jnn.Embed(500, 64, method=Symmetric(bits=4), rngs=rngs))
    assert "500,64" not in str(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(jnp.array([3])))(state))
    one = jnn.Embed(1, 8, method=Symmetric(bits=2), rngs=rngs)
    assert one(jnp.array([0, 0])).shape == (2, 8)


def test_out_axes(rngs):
    per_channel = Symmetric(bits=2, per="channel")
    assert jnn.Embed(30, 12, method=per_channel, rngs=rngs).embedding.scale.shape == (1, 30, 1)
    assert jnn.Conv(6, 8, (3, 3), method=per_channel, rngs=rngs).kernel.scale.shape == (1, 8, 1)
    for transpose in (False, True):
        layer = jnn.ConvTranspose(6, 8, (3, 3), transpose_kernel=transpose, method=per_channel, rngs=rngs)
        assert layer.kernel.scale.shape == (1, 8, 1)


def test_out_sharding(rngs):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    linear, embed = (kind(6, 6, method=Symmetric(bits=3), rngs=rngs) for kind in (jnn.Linear, jnn.Embed))
    spec = jax.P("x", None)
    with jax.set_mesh(mesh):
        outputs = linear(jnp.ones((2, 6)), spec), embed(jnp.array([1, 2]), spec), embed.attend(jnp.ones((2, 6)), spec)
    assert [out.sharding.spec for out in outputs] == [spec] * 3


@pytest.mark.parametrize("method", [KMeans(bits=3), Product(bits=3, dim=4), Uniform(bits=4)])
def test_a_centroid_receives_the_sum_over_its_weights(method, rng):
    layer = jnn.Linear(12, 20, method=method, rngs=nnx.Rngs(0))
    x = rng.normal(size=(5, 12)).astype(np.float32)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)["kernel"]
    to_weight = 2 * x.T @ (x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]))
    array = layer.kernel.array
    codes = np.asarray(array.unpack())
    cut = np.asarray(array.layout.to_vectors(jnp.asarray(to_weight)))
    if isinstance(method, Uniform):
        scale, zero = np.asarray(array.decoder.scale), np.asarray(array.decoder.zero_point)
        np.testing.assert_allclose(gradient["scale"][...], np.sum(cut * (codes - zero)).reshape(1, 1, 1), rtol=1e-4)
        np.testing.assert_allclose(gradient["zero_point"][...], -np.sum(cut * scale).reshape(1, 1, 1), rtol=1e-4)
        return
    want = np.zeros(array.decoder.vectors.shape, np.float32)
    for g, out, m in np.ndindex(codes.shape):
        want[0, 0, m, codes[g, out, m]] += cut[g, out]
    np.testing.assert_allclose(gradient["vectors"][...], want, rtol=1e-4, atol=1e-4)
    assert "words" not in gradient


TRAININGS = [
    (StraightThrough(), Symmetric(bits=4)),
    (StraightThrough(), Uniform(bits=2, per=8)),
    (StraightThrough(learned_step=True), Symmetric(bits=3, per="channel")),
    (SoftAssignment(0.05), KMeans(bits=3)),
    (QuantNoise(0.2), Product(bits=3, dim=4)),
    (QuantNoise(1.0), Symmetric(bits=4)),
]


@pytest.mark.parametrize(("training", "method"), TRAININGS, ids=str)
def test_training_layers(training, method, rng):
    layer = jnn.Linear(12, 20, method=method, training=training, rngs=nnx.Rngs(0))
    latent = nnx.Linear(12, 20, rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_array_equal(layer.kernel.weight[...], latent)
    layout = method.layout((12, 20), "float32")
    extra = training.learned(latent, method, layout), training.state(latent, method, layout)
    x = jnp.asarray(rng.normal(size=(5, 12)), jnp.float32)
    if not isinstance(training, QuantNoise):
        seen, state = training.weight(latent, extra, method, layout, key=None, train=True)
        np.testing.assert_allclose(layer(x), x @ seen, rtol=1e-4, atol=1e-5)
        for name, value in state.items():
            np.testing.assert_allclose(layer.kernel.state[name][...], value, rtol=1e-6)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert float(jnp.abs(gradient["kernel"]["weight"][...]).max()) > 0
    layer.eval()
    before = jax.tree.map(np.asarray, nnx.state(layer, jnn.TrainingState))
    outputs = layer(x)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer, jnn.TrainingState), before)
    layer.train()
    assert layer.kernel.deterministic is False
    if isinstance(training, QuantNoise) and not isinstance(method, Symmetric | Uniform):
        np.testing.assert_array_equal(outputs, layer.eval() or x @ latent)
        return
    model = jnn.harden_model(nnx.Sequential(layer), key=jax.random.key(0))
    np.testing.assert_allclose(model(x), outputs, rtol=1e-6, atol=1e-6)


def test_noise_is_fresh_in_every_step_and_repeats_from_the_same_state():
    def layer():
        return jnn.Linear(16, 16, method=Product(bits=3), training=QuantNoise(0.5), rngs=nnx.Rngs(1, quant_noise=2))

    one, other = layer(), layer()
    first, second = one(jnp.ones((1, 16))), nnx.jit(lambda layer: layer(jnp.ones((1, 16))))(one)
    assert not np.array_equal(first, second)
    assert int(one.kernel.noise.count[...]) == 2
    np.testing.assert_array_equal(other(jnp.ones((1, 16))), first)
    nnx.reseed(one, quant_noise=7)
    assert not np.array_equal(one(jnp.ones((1, 16))), first)
    assert one.kernel.noise.key.tag == "quant_noise"


def test_soft_assignment_remembers_its_codebook_under_transforms():
    layer = jnn.Linear(16, 16, method=KMeans(bits=2), training=SoftAssignment(0.05), rngs=nnx.Rngs(0))
    x, start = jnp.ones((2, 16)), layer.kernel.state.codebook[...]

    @nnx.jit
    def step(layer):
        return nnx.value_and_grad(lambda layer: jnp.sum(nnx.remat(lambda layer: layer(x))(layer)))(layer)[0]

    eager = nnx.clone(layer)
    loss = step(layer)
    assert float(loss) == pytest.approx(float(jnp.sum(eager(x))), rel=1e-5)
    assert not np.array_equal(layer.kernel.state.codebook[...], start)
    np.testing.assert_allclose(layer.kernel.state.codebook[...], eager.kernel.state.codebook[...], rtol=1e-5)


def levels(x, low, high, bits):
    step = (high - low) / (2**bits - 1)
    return np.clip(np.round((x - low) / step), 0, 2**bits - 1) * step + low


def test_inputs_are_rounded_in_the_range_of_the_batch(rng):
    x = rng.normal(size=(6, 12)).astype(np.float32)
    for name, args, shape in (("Linear", (12, 8), (6, 12)), ("Conv", (4, 8, (2,)), (2, 9, 4))):
        layer, flax_layer = pair(name, args, {}, method=Symmetric(bits=3), act_bits=3)
        inputs = x.reshape(shape)
        got, want = layer(inputs), flax_layer(levels(inputs, x.min(), x.max(), 3))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    layer, flax_layer = pair("ConvTranspose", (4, 8, (2,)), {}, act_bits=3)
    np.testing.assert_allclose(
        layer(x.reshape(2, 9, 4)), flax_layer(levels(x.reshape(2, 9, 4), x.min(), x.max(), 3)), rtol=1e-4, atol=1e-4
    )
    layer, flax_layer = pair("Embed", (30, 12), {}, method=Symmetric(bits=3), act_bits=3)
    np.testing.assert_allclose(layer.attend(x), flax_layer.attend(levels(x, x.min(), x.max(), 3)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(layer(jnp.arange(30)), layer.embedding[...])


def test_ranges_are_tracked_in_training_only(rng):
    layer = jnn.Linear(12, 8, act_bits=4, act_momentum=0.75, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...])
    first, second = rng.normal(size=(2, 6, 12)).astype(np.float32)
    layer.eval()
    want = levels(first, first.min(), first.max(), 4) @ kernel
    np.testing.assert_allclose(layer(first), want, rtol=1e-4, atol=1e-5)  # nothing tracked yet
    assert np.isnan(layer.input_range[...]).all()
    layer.train()
    nnx.jit(lambda layer, x: layer(x))(layer, first)
    np.testing.assert_allclose(layer.input_range[...], [first.min(), first.max()])
    got = layer(second)
    low, high = (0.75 * f(first) + 0.25 * f(second) for f in (np.min, np.max))
    np.testing.assert_allclose(layer.input_range[...], [low, high], rtol=1e-6)
    np.testing.assert_allclose(got, levels(second, low, high, 4) @ kernel, rtol=1e-4, atol=1e-5)
    layer.eval()
    np.testing.assert_allclose(layer(first), levels(first, low, high, 4) @ kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.input_range[...], [low, high], rtol=1e-6)


def test_integer_inputs_are_rounded_as_floats():
    layer = jnn.Linear(4, 3, act_bits=8, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(jnp.array([[0, 1, 2, 255]])), layer(jnp.array([[0.0, 1, 2, 255]])))


def test_reads_like_a_parameter(rngs, rng):
    weight = jnn.Linear(12, 20, method=KMeans(bits=3), rngs=rngs).kernel
    array, x = np.asarray(weight[...]), rng.normal(size=(3, 12)).astype(np.float32)
    assert (weight.shape, weight.ndim, weight.size, weight.dtype) == ((12, 20), 2, 240, jnp.float32)
    for value in (
        weight.value,
        weight.get_value(),
        jnp.asarray(weight),
        np.asarray(weight),
        weight.T.T,
        weight.reshape(12, 20),
        -1 * -weight,
    ):
        np.testing.assert_array_equal(value, array)
    np.testing.assert_array_equal(weight[2:4, 0], array[2:4, 0])
    for value in (x @ weight, weight.__rmatmul__(x), jnp.dot(x, weight), jnp.asarray(x) @ weight):
        np.testing.assert_allclose(value, x @ array, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weight * 2 + 1 - weight / 2, array * 1.5 + 1, rtol=1e-6)
    np.testing.assert_allclose(2 * weight + weight, 3 * array, rtol=1e-6)
    with pytest.raises(AttributeError, match="'Quantized' object has no attribute 'nonsense'"):
        _ = weight.nonsense
    with pytest.raises(NotImplementedError):
        jnn.weights.Weight().get_value()
    with pytest.raises(NotImplementedError):
        _ = jnn.weights.Weight().shape


def test_int8_codebooks_do_not_train(rngs):
    kernel = jnn.Linear(12, 20, method=KMeans(bits=3, codebook_dtype="int8"), rngs=rngs).kernel
    assert {name: type(variable) for name, variable in nnx.state(kernel).items()} == {
        "scale": nnx.Param,
        "vectors": jnn.Codes,
        "words": jnn.Codes,
    }


@pytest.mark.parametrize("training", [None, QuantNoise(0.5)])
def test_copies(training, rngs):
    layer = jnn.Linear(12, 20, method=Product(bits=3), training=training, act_bits=4, act_momentum=0.9, rngs=rngs)
    x = jnp.ones((2, 12))
    graph, state = nnx.split(layer)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), nnx.clone(layer)]
    copies.append(nnx.merge(graph, jax.tree.map(jnp.copy, state)))
    assert hash(graph) == hash(nnx.split(copies[0])[0])
    outputs = layer(x)
    for other in copies:
        assert type(other) is jnn.Linear
        np.testing.assert_array_equal(other(x), outputs)
        assert float(other.input_range[...][1]) == 1.0


def test_is_printed_in_full(rngs, capsys):
    layer = jnn.Linear(12, 20, method=KMeans(bits=3), rngs=rngs)
    assert "words=Codes(" in repr(layer)
    assert "Layout(shape=(12, 20)" in repr(layer)
    nnx.display(layer)
    assert "Codes" in capsys.readouterr().out
    assert "Codes" in nnx.tabulate(layer, jnp.ones((1, 12)))


def test_shapes_without_arrays():
    layer = nnx.eval_shape(lambda: jnn.Linear(12, 20, method=KMeans(bits=3), rngs=nnx.Rngs(0)))
    assert layer.kernel.array.nbytes == jnn.Linear(12, 20, method=KMeans(bits=3), rngs=nnx.Rngs(0)).kernel.array.nbytes


REFUSED = [
    ({"training": StraightThrough()}, ValueError, r"`training` must come with a `method`, got StraightThrough\("),
    ({"training": StraightThrough(), "method": KMeans(bits=2)}, ValueError, "trains Symmetric or Uniform weights"),
    ({"method": "KMeans"}, TypeError, "`method` must be a method such as KMeans"),
    ({"method": KMeans(bits=2), "training": 3}, TypeError, "`training` must be a way to train"),
    ({"act_bits": 0}, ValueError, "`act_bits` must be a whole number from 1 to 8, got 0"),
    ({"act_bits": 9}, ValueError, "`act_bits` must be a whole number from 1 to 8, got 9"),
    ({"act_bits": True}, ValueError, "`act_bits` must be a whole number from 1 to 8, got True"),
    ({"act_bits": 2.5}, ValueError, "`act_bits` must be a whole number from 1 to 8, got 2.5"),
    ({"act_momentum": 0.9}, ValueError, "`act_momentum` must come with `act_bits`, got 0.9 alone"),
    ({"act_bits": 4, "act_momentum": 1.0}, ValueError, "`act_momentum` must be at least 0 and below 1, got 1.0"),
    ({"act_bits": 4, "act_momentum": -0.1}, ValueError, "`act_momentum` must be at least 0 and below 1, got -0.1"),
    ({"method": KMeans(bits=12)}, ValueError, "`k` must be at most the number of values"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(options, kind, message):
    for make in (lambda **k: jnn.Linear(12, 20, **k), lambda **k: jnn.Conv(2, 3, (2, 2), **k)):
        with pytest.raises(kind, match=message):
            make(**options, rngs=nnx.Rngs(0))


def test_stacked_weight_needs_its_transform(rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return jnn.Linear(4, 4, method=Symmetric(bits=3), rngs=rngs)

    with pytest.raises(ValueError, match="stacked layers go through jax"):
        make(rngs)(jnp.ones((2, 4)))
