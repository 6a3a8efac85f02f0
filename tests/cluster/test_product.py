import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.cluster.product import fit_product
from jaxvq.ops.nearest import nearest


def distortion(points, codebook):
    return float(jnp.mean((points - codebook[nearest(points, codebook)]) ** 2))


def test_reaches_the_known_distortion_of_a_gaussian():
    points = jax.random.normal(jax.random.key(0), (1, 8192, 2))
    codebook = fit_product(jax.random.key(1), points, 16, iterations=30)[0]
    assert distortion(points[0], codebook) == pytest.approx(0.1074, rel=0.03)


def test_sets_are_independent():
    points = jax.random.normal(jax.random.key(0), (3, 600, 4)) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    codebooks = fit_product(jax.random.key(1), points, 16, iterations=10)
    assert codebooks.shape == (3, 16, 4)
    assert codebooks.dtype == jnp.float32
    errors = np.array([distortion(p, c) for p, c in zip(points, codebooks, strict=True)]) / np.array([1, 1e2, 1e4])
    np.testing.assert_allclose(errors, errors[0], rtol=0.15)
    changed = fit_product(jax.random.key(1), points.at[2].multiply(3.0), 16, iterations=10)
    np.testing.assert_array_equal(changed[:2], codebooks[:2])


def test_the_best_of_several_starts_is_kept():
    points = jax.random.normal(jax.random.key(2), (1, 500, 2))
    keys = [jax.random.key(i) for i in range(6)]
    fit = jax.jit(fit_product, static_argnums=2, static_argnames=("iterations", "restarts"))
    once = [distortion(points[0], fit(key, points, 12, iterations=8)[0]) for key in keys]
    several = [distortion(points[0], fit(key, points, 12, iterations=8, restarts=8)[0]) for key in keys]
    assert np.mean(several) < np.mean(once)
    assert max(several) < np.median(once)


@pytest.mark.parametrize("shape", [(1, 400), (1, 400, 2)])
def test_padding_by_weight_or_count_is_never_seen(shape):
    points = jax.random.normal(jax.random.key(0), (1, 400, 2)).at[0, 300:].set(1e4)
    weights = jnp.ones(shape).at[0, 300:].set(0)
    by_weight = fit_product(jax.random.key(1), points, 8, weights=weights, iterations=5)
    by_count = jax.jit(lambda count: fit_product(jax.random.key(1), points, 8, iterations=5, count=count))(300)
    np.testing.assert_allclose(by_weight, by_count, atol=1e-4)
    assert float(jnp.abs(by_weight).max()) < 10


def test_as_many_centroids_as_points_is_exact():
    points = jax.random.normal(jax.random.key(0), (2, 20, 3))
    codebooks = fit_product(jax.random.key(1), points, 20, iterations=3)
    assert max(distortion(p, c) for p, c in zip(points, codebooks, strict=True)) < 1e-10


def test_same_key_same_bits():
    points = jax.random.normal(jax.random.key(0), (2, 500, 4)).astype(jnp.bfloat16)
    fit = jax.jit(lambda key: fit_product(key, points, 16, iterations=5))
    np.testing.assert_array_equal(fit(jax.random.key(3)), fit(jax.random.key(3)))
    assert not np.array_equal(fit(jax.random.key(3)), fit(jax.random.key(4)))
