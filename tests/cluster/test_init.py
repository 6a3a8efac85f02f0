import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.cluster.init import kmeans_plus_plus


def rows(array):
    return {tuple(row) for row in np.asarray(array).tolist()}


@pytest.mark.parametrize("n", [300, 20_000])
def test_draws_distinct_points(n):
    points = jax.random.normal(jax.random.key(0), (n, 3))
    chosen = kmeans_plus_plus(jax.random.key(1), points, 50)
    assert chosen.shape == (50, 3)
    assert chosen.dtype == jnp.float32
    assert len(rows(chosen)) == 50
    assert rows(chosen) <= rows(points)


def test_one_from_each_of_many_far_blobs():
    centres = np.stack(np.meshgrid(*[np.arange(6) * 100.0] * 2), -1).reshape(-1, 2)
    noise = np.random.default_rng(0).normal(size=(36, 30, 2)) * 0.01
    points = jnp.asarray((centres[:, None] + noise).reshape(-1, 2), jnp.float32)
    chosen = kmeans_plus_plus(jax.random.key(0), points, 36)
    assert len(rows(jnp.round(chosen / 100))) == 36


@pytest.mark.parametrize("n", [200, 30_000])
def test_a_point_of_weight_zero_is_never_drawn(n):
    points = jax.random.normal(jax.random.key(2), (n, 2))
    weights = jnp.zeros(n).at[n // 2 : n // 2 + 40].set(1e-3)
    for seed in range(5):
        chosen = kmeans_plus_plus(jax.random.key(seed), points, 40, weights=weights)
        assert rows(chosen) <= rows(points[n // 2 : n // 2 + 40])


def test_weights_are_the_odds_of_the_first_draw():
    points, weights = jnp.arange(4.0)[:, None], jnp.array([1.0, 2.0, 0.0, 5.0])
    draw = jax.jit(jax.vmap(lambda key: kmeans_plus_plus(key, points, 1, weights=weights)[0, 0]))
    counts = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(0), 4000)), int), minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.125, 0.25, 0, 0.625], atol=0.03)


def test_the_second_draw_follows_the_squared_distance():
    points = jnp.array([[0.0], [1.0], [3.0]])
    pairs = jax.jit(jax.vmap(lambda key: kmeans_plus_plus(key, points, 2)[:, 0]))(
        jax.random.split(jax.random.key(0), 6000)
    )
    after_zero = np.asarray(pairs[pairs[:, 0] == 0][:, 1])
    np.testing.assert_allclose((after_zero == 3).mean(), 0.9, atol=0.03)


def test_fewer_distinct_points_than_k_repeat():
    points = jnp.tile(jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), (4, 1))
    assert rows(kmeans_plus_plus(jax.random.key(0), points, 10)) == rows(points)


def test_several_at_a_time_beyond_1024():
    points = jax.random.normal(jax.random.key(0), (4000, 2))
    chosen = kmeans_plus_plus(jax.random.key(1), points, 1100)
    assert chosen.shape == (1100, 2)
    assert len(rows(chosen)) > 1050


def test_same_key_same_bits_under_jit():
    points = jax.random.normal(jax.random.key(0), (10_000, 4)).astype(jnp.bfloat16)
    plain = kmeans_plus_plus(jax.random.key(1), points, 20)
    jitted = jax.jit(kmeans_plus_plus, static_argnums=2)(jax.random.key(1), points, 20)
    np.testing.assert_array_equal(plain, jitted)
    assert not np.array_equal(plain, kmeans_plus_plus(jax.random.key(2), points, 20))


def test_no_points():
    with pytest.raises(ValueError, match=r"`points` must hold at least one point to draw, got \(0, 2\)"):
        kmeans_plus_plus(jax.random.key(0), jnp.zeros((0, 2)), 4)
