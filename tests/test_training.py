"""The contract of the ways to train a weight that will be quantized, and what each promises beyond it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import TRAININGS

from jaxvq.methods import KMeans, Product, RowVQ, Symmetric, Uniform
from jaxvq.training import QuantNoise, SoftAssignment, StraightThrough

every_training = pytest.mark.parametrize(("training", "method"), TRAININGS, ids=lambda value: str(value))


def start(training, method, latent):
    layout = method.layout(latent.shape, latent.dtype)
    return layout, (training.learned(latent, method, layout), training.state(latent, method, layout))


@pytest.fixture
def latent(rng):
    return jnp.asarray(rng.normal(size=(48, 10)), jnp.float32)


@every_training
def test_what_a_layer_sees_after_training_is_what_hardens(training, method, latent, key):
    training.check(method)
    layout, extra = start(training, method, latent)
    seen, state = training.weight(latent, extra, method, layout, key=None, train=False)
    hardened = training.harden(latent, extra, method, layout, key=key)
    hardened.validate()
    if isinstance(method, Product | RowVQ):
        seen = method.fit(latent, layout, key=key).dequantize()  # it trains the weight, not the codes
    np.testing.assert_array_equal(seen, hardened.dequantize())
    for before, after in zip(jax.tree.leaves(extra[1]), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(before, after)


@every_training
def test_compiles_once_and_is_the_same_jitted(training, method, latent, key):
    layout, extra = start(training, method, latent)

    def weight(latent, extra, key):
        return training.weight(latent, extra, method, layout, key=key, train=True)

    jitted = jax.jit(weight)
    seen, state = jitted(latent, extra, key)
    again, _ = jitted(latent + 0.1, (extra[0], state), jax.random.key(5))
    assert jitted._cache_size() == 1
    assert seen.shape == latent.shape == again.shape
    assert seen.dtype == latent.dtype
    np.testing.assert_allclose(weight(latent, extra, key)[0], seen, atol=1e-5)


@every_training
def test_gradient_reaches_the_latent_weight_and_what_is_learned(training, method, latent, key):
    layout, extra = start(training, method, latent)

    def loss(latent, learned):
        seen, _ = training.weight(latent, (learned, extra[1]), method, layout, key=key, train=True)
        return jnp.sum((seen - 3) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1))(latent, extra[0])
    for gradient in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient)


@every_training
def test_stacked_layers_under_scan(training, method, latent, key):
    layout, extra = start(training, method, latent)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (latent, extra))

    def step(carry, layer):
        seen, _ = training.weight(*layer, method, layout, key=key, train=True)
        return carry, seen

    _, both = jax.lax.scan(step, None, stacked)
    alone, _ = training.weight(latent, extra, method, layout, key=key, train=True)
    np.testing.assert_allclose(both[1], alone, atol=1e-5)


def test_learned_steps_start_where_the_paper_says(latent):
    training, method = StraightThrough(learned_step=True), Symmetric(bits=4, per="channel")
    _, (learned, _) = start(training, method, latent)
    expected = 2 * np.abs(latent).mean(axis=0) / np.sqrt(7)
    np.testing.assert_allclose(learned["scale"][0, :, 0], expected, rtol=1e-5)


def test_learned_steps_have_scaled_gradients(latent):
    training, method = StraightThrough(learned_step=True), Symmetric(bits=3)
    layout, (learned, state) = start(training, method, latent)
    scale = float(learned["scale"].item())
    got = jax.grad(
        lambda learned: training.weight(latent, (learned, state), method, layout, key=None, train=True)[0].sum()
    )(learned)
    ratio = np.asarray(latent) / scale
    plain = np.where(np.abs(ratio) <= 3, np.round(ratio) - ratio, np.sign(ratio) * 3).sum()
    np.testing.assert_allclose(got["scale"].item(), plain / np.sqrt(latent.size * 3), rtol=1e-3)


def test_soft_assignment_is_the_published_attention(latent):
    training, method = SoftAssignment(temperature=0.05, iterations=2), KMeans(bits=2)
    layout, (learned, state) = start(training, method, latent)
    seen, after = training.weight(latent, (learned, state), method, layout, key=None, train=True)
    values = np.asarray(latent, np.float64).ravel()
    codebook = np.asarray(state["codebook"], np.float64).ravel()

    def attention():
        logits = -((values[:, None] - codebook) ** 2) / (0.05 * values.var())
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    for _ in range(2):
        shares = attention()
        codebook = shares.T @ values / shares.sum(axis=0)
    np.testing.assert_allclose(after["codebook"].ravel(), codebook, rtol=1e-4)
    np.testing.assert_allclose(seen.ravel(), attention() @ codebook, rtol=1e-3, atol=1e-4)


def test_soft_assignment_hardens_as_the_temperature_falls(latent):
    method = KMeans(bits=2)
    layout, extra = start(SoftAssignment(), method, latent)
    distances = []
    for temperature in (1e-1, 1e-2, 1e-4):
        training = SoftAssignment(temperature=temperature)
        soft, state = training.weight(latent, extra, method, layout, key=None, train=True)
        hard, _ = training.weight(latent, ({}, state), method, layout, key=None, train=False)
        distances.append(float(jnp.mean((soft - hard) ** 2)))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3


def test_soft_assignment_of_a_constant_weight_is_finite():
    training, method, latent = SoftAssignment(), KMeans(bits=1), jnp.ones((6, 4))
    layout, extra = start(training, method, latent)
    gradient = jax.grad(lambda latent: training.weight(latent, extra, method, layout, key=None, train=True)[0].sum())(
        latent
    )
    assert np.all(np.isfinite(gradient))


def test_noise_sets_whole_vectors_to_zero_and_keeps_the_mean(key):
    training, method, latent = QuantNoise(rate=0.25), Product(bits=2, dim=4), jnp.ones((400, 100))
    layout, extra = start(training, method, latent)
    seen, _ = training.weight(latent, extra, method, layout, key=key, train=True)
    vectors = np.asarray(layout.to_vectors(seen))
    zero = (vectors == 0).all(axis=-1)
    np.testing.assert_array_equal(zero, (vectors == 0).any(axis=-1))
    assert abs(zero.mean() - 0.25) < 0.01
    np.testing.assert_allclose(vectors[~zero], 4 / 3, rtol=1e-6)
    gradient = jax.grad(lambda w: training.weight(w, extra, method, layout, key=key, train=True)[0].sum())(latent)
    np.testing.assert_array_equal(gradient, 1)


def test_noise_rounds_that_fraction_of_values(latent, key):
    training, method = QuantNoise(rate=0.3), Symmetric(bits=2)
    layout, extra = start(training, method, latent)
    seen, _ = training.weight(latent, extra, method, layout, key=key, train=True)
    rounded, _ = training.weight(latent, extra, method, layout, key=None, train=False)
    hit = np.asarray(seen != latent)
    np.testing.assert_array_equal(seen[hit], rounded[hit])
    assert abs(hit.mean() - 0.3) < 0.1


@pytest.mark.parametrize(
    ("training", "method", "message"),
    [
        (StraightThrough(), KMeans(bits=2), "trains Symmetric or Uniform weights, got KMeans"),
        (StraightThrough(learned_step=True), Uniform(bits=2), "trains Symmetric weights, got Uniform"),
        (SoftAssignment(), Product(), "trains KMeans palettes, got Product"),
        (QuantNoise(rate=1.0), Product(), "`rate` must be below 1"),
    ],
)
def test_methods_that_cannot_train_so(training, method, message):
    with pytest.raises(ValueError, match=message):
        training.check(method)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SoftAssignment(temperature=0.0), "`temperature` must be above 0, got 0.0"),
        (lambda: SoftAssignment(iterations=0), "`iterations` must be at least 1, got 0"),
        (lambda: QuantNoise(rate=0.0), "`rate` must be above 0 and at most 1, got 0.0"),
        (lambda: QuantNoise(rate=1.5), "`rate` must be above 0 and at most 1, got 1.5"),
    ],
)
def test_settings_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_noise_without_a_key(latent):
    layout, extra = start(QuantNoise(), KMeans(bits=2), latent)
    with pytest.raises(ValueError, match="`key` must be a random key to train with QuantNoise"):
        QuantNoise().weight(latent, extra, KMeans(bits=2), layout, key=None, train=True)
