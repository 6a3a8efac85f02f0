import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.cluster.residual import encode_residual, fit_residual, joint_update


def decode(codes, codebooks):
    return sum(
        np.asarray(table, np.float64)[column] for table, column in zip(codebooks, np.asarray(codes).T, strict=True)
    )


def distortion(points, codebooks, beam):
    return ((np.asarray(points) - decode(encode_residual(points, codebooks, beam=beam), codebooks)) ** 2).mean()


def every_sum(codebooks):
    """All codes, and what they decode to."""
    codes = np.array(list(itertools.product(*[range(len(table)) for table in codebooks])))
    return codes, decode(codes, codebooks)


def test_greedy_encoding_equals_numpy():
    points, codebooks = jax.random.normal(jax.random.key(0), (300, 4)), jax.random.normal(jax.random.key(1), (3, 8, 4))
    left, expected = np.asarray(points, np.float64), []
    for table in np.asarray(codebooks, np.float64):
        expected.append(((left[:, None] - table) ** 2).sum(-1).argmin(1))
        left = left - table[expected[-1]]
    np.testing.assert_array_equal(encode_residual(points, codebooks, beam=1), np.stack(expected, 1))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_wide_beam_finds_the_nearest_sum(weighted):
    points, codebooks = jax.random.normal(jax.random.key(0), (200, 3)), jax.random.normal(jax.random.key(1), (3, 4, 3))
    weights = jax.random.uniform(jax.random.key(2), (200, 3)) + 0.01 if weighted else jnp.ones((200, 3))
    codes, sums = every_sum(codebooks)
    errors = (np.asarray(weights)[:, None] * (np.asarray(points)[:, None] - sums) ** 2).sum(-1)
    found = encode_residual(points, codebooks, weights=weights if weighted else None, beam=16)
    np.testing.assert_array_equal(found, codes[errors.argmin(1)])


def test_far_from_the_origin():
    points = jax.random.normal(jax.random.key(0), (200, 2)) + 1000
    codebooks = jax.random.normal(jax.random.key(1), (2, 8, 2)).at[0].add(1000)
    _, sums = every_sum(codebooks)
    errors = ((np.asarray(points)[:, None] - sums) ** 2).sum(-1)
    found = ((np.asarray(points) - decode(encode_residual(points, codebooks, beam=8), codebooks)) ** 2).sum(-1)
    np.testing.assert_allclose(found, errors.min(1), atol=1e-3)


def test_beam_and_refinement_beat_greedy():
    points = jax.random.normal(jax.random.key(0), (4096, 8))
    greedy = fit_residual(jax.random.key(1), points, 16, 2, iterations=15, beam=1)
    joint = fit_residual(jax.random.key(1), points, 16, 2, iterations=15, beam=8)
    assert greedy.shape == (2, 16, 8)
    assert greedy.dtype == jnp.float32
    assert distortion(points, greedy, beam=1) == pytest.approx(0.3602, rel=0.03)
    assert distortion(points, greedy, beam=8) < 0.97 * distortion(points, greedy, beam=1)
    assert distortion(points, joint, beam=8) < 0.98 * distortion(points, greedy, beam=8)


def test_a_second_stage_quantizes_what_the_first_left():
    points = jnp.array([[0.0], [1.0], [10.0], [11.0]])
    codebooks = fit_residual(jax.random.key(0), points, 2, 2, iterations=5)
    assert distortion(points, codebooks, beam=4) < 1e-10


def test_joint_update_solves_least_squares():
    rng = np.random.default_rng(0)
    points, codes = rng.normal(size=(500, 2)).astype("f"), rng.integers(0, 3, size=(500, 2)).astype(np.int32)
    mass = rng.uniform(0.1, 2, size=(500, 1)).astype("f")
    codebooks = jnp.zeros((2, 3, 2))
    for _ in range(20):
        codebooks = joint_update(jnp.asarray(points), jnp.asarray(mass), codebooks, jnp.asarray(codes))
    one_hot = np.concatenate([np.eye(3)[codes[:, 0]], np.eye(3)[codes[:, 1]]], axis=1)
    solution = np.linalg.lstsq(np.sqrt(mass) * one_hot, np.sqrt(mass) * points, rcond=None)[0]
    np.testing.assert_allclose(decode(codes, codebooks), one_hot @ solution, atol=1e-4)


@pytest.mark.parametrize("shape", [(400,), (400, 2)])
def test_padding_is_never_seen(shape):
    points = jax.random.normal(jax.random.key(0), (400, 2)).at[300:].set(1e4)
    weights = jnp.ones(shape).at[300:].set(0)
    by_weight = fit_residual(jax.random.key(1), points, 4, 2, iterations=5, weights=weights)
    by_count = fit_residual(jax.random.key(1), points, 4, 2, iterations=5, count=300)
    assert float(jnp.abs(by_weight).max()) < 10
    assert float(jnp.abs(by_count).max()) < 10


def test_same_key_same_bits_under_jit():
    points = jax.random.normal(jax.random.key(0), (300, 4)).astype(jnp.bfloat16)
    plain = fit_residual(jax.random.key(1), points, 8, 2, iterations=3)
    jitted = jax.jit(lambda key, points: fit_residual(key, points, 8, 2, iterations=3))(jax.random.key(1), points)
    np.testing.assert_array_equal(plain, jitted)
