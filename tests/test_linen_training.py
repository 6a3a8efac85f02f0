"""Training with the linen layers: what they compute with, what they remember, and what becomes of it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jaxvq
from jaxvq import KMeans, Product, QuantNoise, Rule, SoftAssignment, StraightThrough, Symmetric, Uniform, linen
from jaxvq.array import is_quantized


def inputs_of(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


LATENT = {
    "straight-through": {"method": Symmetric(bits=4, per="channel"), "training": StraightThrough()},
    "learned steps": {"method": Symmetric(bits=3), "training": StraightThrough(learned_step=True)},
    "one bit": {"method": Symmetric(bits=1), "training": StraightThrough()},
    "soft": {"method": KMeans(bits=2), "training": SoftAssignment()},
    "noise": {"method": Uniform(bits=3), "training": QuantNoise(rate=0.5)},
}


class Network(nn.Module):
    """One of each layer."""

    options: dict

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Conv(4, (3,), **self.options)(x))
        x = jnp.tanh(linen.ConvTranspose(4, (3,), transpose_kernel=True, **self.options)(x))
        x = jnp.tanh(linen.DenseGeneral(8, **self.options)(x))
        return linen.Embed(6, 8, **self.options).attend(x)


@pytest.mark.parametrize("name", LATENT)
def test_hardened_weights_compute_the_same(name, key, tmp_path):
    model, x = linen.Dense(6, act_bits=4, act_momentum=0.9, **LATENT[name]), inputs_of(3, 8)
    variables = model.init(key, x)
    train = jax.jit(functools.partial(model.apply, mutable=["quantization"]))
    for step in range(2):
        _, updates = train(variables, x, rngs={"quant_noise": jax.random.key(step)})
        variables = {**variables, **updates}
    params = linen.harden(model, variables, x, key=key)
    assert is_quantized(params["kernel"])
    assert set(params) == {"kernel", "bias"}
    jaxvq.save(tmp_path / "model.safetensors", params)
    stored = linen.to_variables(jaxvq.load(tmp_path / "model.safetensors"))
    expected, run = model.apply(variables, x), functools.partial(linen.apply, model)
    got = run({**variables, **linen.to_variables(params)}, x)
    close(got, expected)
    np.testing.assert_array_equal(run({**variables, **stored}, x), got)


def test_every_layer_hardens(key):
    model, x = Network({**LATENT["straight-through"], "act_bits": 4}), inputs_of(2, 5, 4)
    variables = jax.jit(model.init)(key, x)
    params = linen.harden(model, variables, x, key=key)
    layouts = {name: leaf["embedding" if name == "Embed_0" else "kernel"].layout for name, leaf in params.items()}
    assert {name: layout.out_axis for name, layout in layouts.items()} == {
        "Conv_0": 2,
        "ConvTranspose_0": 1,
        "DenseGeneral_0": 1,
        "Embed_0": 0,
    }
    got = jax.jit(functools.partial(linen.apply, model))(linen.to_variables(params), x)
    close(got, jax.jit(model.apply)(variables, x))


def test_weights_of_four_bits_equal_a_numpy_oracle(key):
    layer = linen.Dense(6, use_bias=False, method=Symmetric(bits=4), training=StraightThrough(), act_bits=4)
    x = inputs_of(3, 8)
    variables = layer.init(key, x)
    kernel, inputs = np.asarray(variables["params"]["kernel"]), np.asarray(x)
    step = (kernel.max() - kernel.min()) / 14
    rounded = step * np.clip(np.round(kernel / step), -7, 7)
    low, high = inputs.min(), inputs.max()
    spacing = (high - low) / 15
    seen = np.round((inputs - low) / spacing) * spacing + low
    np.testing.assert_allclose(layer.apply(variables, x), seen @ rounded, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x)))(variables["params"])["kernel"]
    inside = np.abs(kernel) <= 7 * step * (1 + 1e-6)
    np.testing.assert_allclose(gradient, inside * seen.sum(axis=0)[:, None], rtol=1e-4, atol=1e-5)


def test_learned_steps_train_beside_the_weight(key):
    layer = linen.Dense(6, method=Symmetric(bits=2), training=StraightThrough(learned_step=True))
    x = inputs_of(3, 8)
    variables = layer.init(key, x)
    assert set(variables["params"]) == {"kernel", "kernel_scale", "bias"}
    gradient = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x) ** 2))(variables["params"])
    assert float(jnp.abs(gradient["kernel_scale"]).max()) > 0
    hardened = linen.harden(layer, variables, x, key=key)
    close(hardened["kernel"].decoder.scale, variables["params"]["kernel_scale"])


def test_soft_codebooks_are_remembered_where_that_is_allowed(key):
    layer = linen.Dense(6, method=KMeans(bits=2), training=SoftAssignment(temperature=0.5))
    x = inputs_of(3, 8)
    variables = layer.init(key, x)
    evaluated = layer.apply(variables, x)
    trained, updates = layer.apply(variables, x, mutable=["quantization"])
    before, after = variables["quantization"]["kernel"]["codebook"], updates["quantization"]["kernel"]["codebook"]
    assert before.shape == after.shape
    assert float(jnp.abs(before - after).max()) > 1e-4
    assert float(jnp.abs(evaluated - trained).max()) > 1e-4

    def loss(params):
        return jnp.sum(layer.apply({**variables, "params": params}, x, mutable=["quantization"])[0] ** 2)

    assert float(jnp.abs(jax.grad(loss)(variables["params"])["kernel"]).max()) > 0


def test_noise_follows_its_key(key):
    layer = linen.Dense(6, method=Product(bits=2, dim=2), training=QuantNoise(rate=0.3))
    x = inputs_of(3, 8)
    variables = layer.init({"params": key, "quant_noise": key}, x)
    close(layer.apply(variables, x), nn.Dense(6).apply(variables, x))
    noisy = [layer.apply(variables, x, rngs={"quant_noise": jax.random.key(seed)}) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert float(jnp.abs(noisy[0] - noisy[2]).max()) > 1e-3
    hardened = linen.harden(layer, variables, x, key=jax.random.key(3))["kernel"]
    expected = jaxvq.quantize_params(variables["params"], Rule("kernel", layer.method), key=jax.random.key(3))["kernel"]
    jax.tree.map(np.testing.assert_array_equal, hardened, expected)


def test_tracked_ranges_follow_the_batches(key):
    layer = linen.Dense(6, act_bits=8, act_momentum=0.5)
    x = jnp.linspace(-1, 3, 8)[None]
    variables = layer.init(key, x)
    assert bool(jnp.isnan(variables["quantization"]["input_range"]).all())
    for scale, expected in ((1, (-1.0, 3.0)), (2, (-1.5, 4.5)), (4, (-2.75, 8.25))):
        _, updates = layer.apply(variables, scale * x, mutable=["quantization"])
        variables = {**variables, **updates}
        close(variables["quantization"]["input_range"], jnp.array(expected))
    far = nn.Dense(6).apply({"params": variables["params"]}, jnp.clip(10 * x, -2.75, 8.25))
    np.testing.assert_allclose(layer.apply(variables, 10 * x), far, atol=0.1)


def test_whole_numbers_are_inputs_too(key):
    layer = linen.Dense(6, act_bits=8)
    x = np.arange(16).reshape(2, 8)
    variables = layer.init(key, x)
    np.testing.assert_allclose(layer.apply(variables, x), nn.Dense(6).apply(variables, x), atol=0.1)


def test_variables_of_a_trained_float_model_are_completed(key):
    x, tracked = inputs_of(3, 8), {"act_bits": 4, "act_momentum": 0.9}
    floats = nn.Dense(6).init(key, x)["params"]
    for name, missing in (("learned steps", "kernel_scale"), ("soft", "quantization")):
        layer = linen.Dense(6, **LATENT[name], **tracked)
        _, variables = layer.apply({"params": floats}, x, mutable=True, rngs={"params": key})
        assert jax.tree.structure(variables) == jax.tree.structure(jax.eval_shape(layer.init, key, x))
        np.testing.assert_array_equal(variables["params"]["kernel"], floats["kernel"])
        with pytest.raises(nn.module.errors.FlaxError, match=missing):
            layer.clone(act_bits=None, act_momentum=None).apply({"params": floats}, x)


class Block(nn.Module):
    options: dict

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(8, **self.options)(x)), None


class Stack(nn.Module):
    options: dict
    collections: tuple = ("params", "codes", "quantization")

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Block),
            variable_axes=dict.fromkeys(self.collections, 0),
            split_rngs={"params": True, "quant_noise": True},
            length=3,
        )
        return scan(self.options, name="blocks")(x, None)[0]


STACKED = {
    "codes": {"method": Symmetric(bits=2)},
    **{name: LATENT[name] for name in ("learned steps", "soft", "noise")},
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers(name, key):
    model, x = Stack({**STACKED[name], "act_bits": 4, "act_momentum": 0.9}), inputs_of(2, 8)
    variables = jax.jit(model.init)(key, x)

    def loss(params, rest):
        rngs = {"quant_noise": jax.random.key(7)}
        out, updates = model.apply({**rest, "params": params}, x, mutable=["quantization"], rngs=rngs)
        return jnp.sum(out**2), updates

    gradient, updates = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], variables)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient["blocks"]))
    variables = {**variables, **updates}
    assert variables["quantization"]["blocks"]["Dense_0"]["input_range"].shape == (3, 2)
    params = linen.harden(model, variables, x, key=key)
    assert params["blocks"]["Dense_0"]["kernel"].shape == (3, 8, 8)
    assert set(params["blocks"]["Dense_0"]) == {"kernel", "bias"}
    got = linen.apply(model, {"quantization": variables["quantization"], **linen.to_variables(params)}, x)
    close(got, model.apply(variables, x))


def test_stacked_layers_must_list_their_codes(key):
    model, x = Stack(STACKED["codes"], collections=("params",)), inputs_of(2, 8)
    with pytest.raises(ValueError, match=r'^blocks/Dense_0/kernel: "codes" must be mutable where the weight is'):
        model.init(key, x)
    variables = Stack(STACKED["codes"]).init(key, x)
    with pytest.raises(ValueError, match=r'blocks/Dense_0/kernel: "codes" must have .*, got none; .* list "codes" in'):
        model.apply(variables, x)


class Twice(nn.Module):
    options: dict

    @nn.compact
    def __call__(self, x):
        layer = linen.Dense(8, **self.options)
        return nn.Dense(8)(layer(layer(x)))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.jit, nn.remat], ids=["plain", "jit", "remat"])
def test_harden_keeps_what_is_not_latent(wrap, key):
    model, x = wrap(Twice)(LATENT["learned steps"]), inputs_of(2, 8)
    variables = jax.jit(model.init)(key, x)
    params = linen.harden(model, variables, x, key=key)
    assert jax.tree.structure(params, is_leaf=is_quantized) == jax.tree.structure(Plain().init(key, x)["params"])
    np.testing.assert_array_equal(params["Dense_1"]["kernel"], variables["params"]["Dense_1"]["kernel"])
    close(linen.apply(model, linen.to_variables(params), x), model.apply(variables, x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.Dense(8)(x))


def test_harden_inside_a_recurrent_cell(key):
    class Cell(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry, x):
            carry = jnp.tanh(linen.Dense(4, **LATENT["learned steps"])(jnp.concatenate([carry, x], -1)))
            return carry, carry

        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return jnp.zeros((*input_shape[:-1], 4))

        @property
        def num_feature_axes(self):
            return 1

    model, x = nn.RNN(Cell()), inputs_of(2, 5, 4)
    variables = jax.jit(model.init)(key, x)
    params = linen.harden(model, variables, x, key=key)
    assert set(params["cell"]["Dense_0"]) == {"kernel", "bias"}
    close(linen.apply(model, linen.to_variables(params), x), model.apply(variables, x))


def test_harden_refuses_what_cannot_be_quantized(key, unchecked):
    model, x = linen.Dense(6, **LATENT["straight-through"]), inputs_of(2, 8)
    params = model.init(key, x)["params"]
    broken = {**params, "kernel": params["kernel"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"^kernel: the weight must be finite, got 1 NaN or Inf"):
        linen.harden(model, {"params": broken}, x, key=key)
    with pytest.raises(TypeError, match="`key` must be a random key"):
        linen.harden(model, {"params": params}, x, key=3)


def steps(state, codes, count):
    """The state after some steps of training, and the losses on the way."""
    x, target, traces = inputs_of(16, 8), jnp.arange(16) % 6, []

    @jax.jit
    def step(state, codes):
        traces.append(None)

        def loss(params):
            logits = state.apply_fn({"params": params, "codes": codes}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    losses = []
    for _ in range(count):
        state, value = step(state, codes)
        losses.append(float(value))
    assert len(traces) == 1
    return state, losses


@pytest.mark.parametrize("model", [nn.Dense(6), linen.Dense(6, method=KMeans(bits=2))], ids=["flax", "own"])
def test_codes_are_out_of_reach_of_weight_decay(model, key):
    floats = nn.Dense(6).init(key, inputs_of(3, 8))["params"]
    params = jaxvq.quantize_params(floats, KMeans(bits=2), key=key)
    variables = linen.to_variables(params)
    before = jax.tree.map(np.array, variables["codes"])
    apply = functools.partial(linen.apply, model) if type(model) is nn.Dense else model.apply
    state = TrainState.create(apply_fn=apply, params=variables["params"], tx=optax.adamw(1e-2, weight_decay=0.1))
    state, losses = steps(state, variables["codes"], 30)
    assert losses[-1] < 0.9 * losses[0]
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state.params))
    jax.tree.map(np.testing.assert_array_equal, variables["codes"], before)
    tuned = linen.from_variables({"params": state.params, "codes": variables["codes"]})
    moved = jnp.abs(tuned["kernel"].decoder.vectors - params["kernel"].decoder.vectors).max()
    assert float(moved) > 1e-3
    np.testing.assert_array_equal(tuned["kernel"].unpack(), params["kernel"].unpack())


def test_train_states_are_restored_exactly_by_orbax(key, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    model = linen.Dense(6, method=KMeans(bits=2, codebook_dtype="int8"))
    variables = model.init(key, inputs_of(3, 8))
    optimizer = optax.adamw(1e-2)

    def fresh(params):
        return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    state, _ = steps(fresh(variables["params"]), variables["codes"], 3)
    saved = {"state": state, "codes": variables["codes"]}
    template = jax.tree.map(jnp.zeros_like, {"state": fresh(variables["params"]), "codes": variables["codes"]})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", template)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    (one, _), (other, _) = (steps(s["state"], s["codes"], 2) for s in (saved, restored))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
