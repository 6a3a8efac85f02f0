"""Rounding with straight-through gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.methods import Symmetric, Uniform
from jaxvq.scalar import fake_quant, fake_quant_range, range_of, track_range


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("method", [Symmetric, Uniform])
def test_equals_the_codes_that_the_method_makes(method, bits, rng, key):
    weight = jnp.asarray(rng.normal(size=(50, 7)), jnp.float32)
    layout = method(bits).layout(weight.shape, weight.dtype)
    array = method(bits).fit(weight, layout, key=key)
    decoder = array.decoder
    zero = None if decoder.zero_point is None else decoder.zero_point
    rounded = layout.from_vectors(fake_quant(layout.to_vectors(weight), decoder.scale, zero, bits))
    np.testing.assert_array_equal(rounded, array.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradient_passes_within_the_levels_only(bits):
    scale, largest = 0.5, 2 ** (bits - 1) - 1
    x = jnp.array([-largest * scale - 0.01, -largest * scale, 0.1, largest * scale, largest * scale + 0.01])
    pulled = jnp.array([3.0, -4.0, 5.0, 6.0, 7.0])
    _, pull = jax.vjp(lambda x: fake_quant(x, jnp.array([scale]), None, bits), x)
    np.testing.assert_array_equal(pull(pulled)[0], [0, -4, 5, 6, 0])


def test_gradient_at_one_bit_is_clipped():
    _, pull = jax.vjp(lambda x: fake_quant(x, jnp.array([2.0]), None, 1), jnp.array([-5.0, 0.1, 0.2, 9.0]))
    np.testing.assert_allclose(pull(jnp.array([0.5, -3.0, 2.0, 0.25]))[0], [0.5, -1, 1, 0.25])


def test_gradient_of_the_scale_is_that_of_learned_step_sizes():
    # Esser et al., equation 3: round(v/s) - v/s within, the outermost level beyond.
    x, scale = np.array([-9.0, -0.7, 0.2, 0.6, 9.0]), 0.5
    ratio = x / scale
    expected = np.where(np.abs(ratio) <= 3, np.round(ratio) - ratio, np.sign(ratio) * 3)
    got = jax.grad(lambda s: fake_quant(jnp.asarray(x, jnp.float32), s, None, 3).sum())(jnp.array([scale]))
    np.testing.assert_allclose(got, [expected.sum()], rtol=1e-5)


def test_gradient_of_the_zero_point():
    x = jnp.array([-1.0, 0.3, 9.0])  # beyond the lowest level, between, beyond the highest
    got = jax.grad(lambda z: fake_quant(x, jnp.array([0.5]), z, 2).sum())(jnp.array([1.0]))
    np.testing.assert_allclose(got, [-1.0])  # two values move by -scale each


def test_gradients_keep_shape_and_dtype(rng):
    x = jnp.asarray(rng.normal(size=(4, 6, 1)), jnp.bfloat16)
    scale = jnp.full((1, 6, 1), 0.3)
    to_x, to_scale = jax.grad(lambda x, s: fake_quant(x, s, None, 4).astype(jnp.float32).sum(), argnums=(0, 1))(
        x, scale
    )
    assert (to_x.shape, to_x.dtype) == (x.shape, x.dtype)
    assert (to_scale.shape, to_scale.dtype) == (scale.shape, scale.dtype)


def test_same_under_jit_and_vmap(rng):
    x = jnp.asarray(rng.normal(size=(3, 10)), jnp.float32)
    scale = jnp.array([[0.1], [0.2], [0.3]])
    one_by_one = jnp.stack([fake_quant(row, s, None, 4) for row, s in zip(x, scale, strict=True)])
    np.testing.assert_array_equal(jax.vmap(lambda a, s: fake_quant(a, s, None, 4))(x, scale), one_by_one)
    np.testing.assert_array_equal(jax.jit(fake_quant, static_argnums=(2, 3))(x, scale, None, 4), one_by_one)


def test_activations_have_evenly_spaced_levels_and_an_exact_zero(rng):
    x = jnp.maximum(jnp.asarray(rng.uniform(-1, 3, size=(64, 9)), jnp.float32), 0)
    rounded = fake_quant_range(x, range_of(x), 4)
    levels = np.unique(rounded)
    assert len(levels) == 16
    np.testing.assert_allclose(np.diff(levels), float(x.max()) / 15, rtol=1e-4)
    np.testing.assert_array_equal(rounded[x == 0], 0)
    assert float(jnp.abs(rounded - x).max()) <= float(x.max()) / 30 * 1.001


def test_activations_beyond_a_tracked_range_are_clipped_and_send_no_gradient():
    x, span = jnp.array([-2.0, 0.5, 2.0]), jnp.array([-1.0, 1.0])
    np.testing.assert_allclose(fake_quant_range(x, span, 8)[jnp.array([0, 2])], [-1, 1], rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda x: fake_quant_range(x, span, 8).sum())(x), [0, 1, 0])


def test_activations_without_a_range_take_their_own():
    x = jnp.array([0.0, 0.4, 3.0])
    unknown = jnp.array([jnp.nan, jnp.nan])
    np.testing.assert_array_equal(fake_quant_range(x, unknown, 2), [0, 0, 3])


def test_constant_activations_stay(rng):
    np.testing.assert_array_equal(fake_quant_range(jnp.zeros((3, 2)), range_of(jnp.zeros((3, 2))), 4), 0)


def test_tracked_range_is_the_moving_average():
    tracked = jnp.array([jnp.nan, jnp.nan])
    expected = None
    for low, high in [(-1.0, 2.0), (-3.0, 4.0), (-2.0, 1.0)]:
        tracked = track_range(tracked, jnp.array([low, 0.0, high]), momentum=0.75)
        batch = np.array([low, high])
        expected = batch if expected is None else 0.75 * expected + 0.25 * batch
    np.testing.assert_allclose(tracked, expected, rtol=1e-6)
