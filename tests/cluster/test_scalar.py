"""Optimal one-dimensional codebooks, against the exact package and published constants."""

import jax
import jax.numpy as jnp
import kmeans1d as exact
import numpy as np
import pytest
from sklearn.cluster import KMeans

from jaxvq.cluster.scalar import ascending, kmeans1d, nearest1d, thin

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def mse(values, codebook, weights=None) -> float:
    x, c = np.asarray(values, np.float64), np.sort(np.asarray(codebook, np.float64))
    nearest = c[np.searchsorted((c[1:] + c[:-1]) / 2, x)]
    return float(np.average((x - nearest) ** 2, weights=weights))


def exact_mse(values, k) -> float:
    # The exact centroids, rounded as ours must be.
    return mse(values, np.float32(exact.cluster(np.asarray(values, np.float64).tolist(), k).centroids))


DATA = {
    "normal": lambda rng, n: rng.normal(size=n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(size=n),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "far from zero": lambda rng, n: 1000 + rng.normal(size=n),
    "two far groups": lambda rng, n: rng.choice([0.0, 1e4], n) + rng.normal(size=n),
    "tight groups": lambda rng, n: 10 * rng.normal(size=37)[rng.integers(0, 37, n)] + 0.01 * rng.normal(size=n),
    "log-normal": lambda rng, n: np.exp(2 * rng.normal(size=n)) * rng.choice([-1, 1], n),
    "bfloat16": lambda rng, n: np.asarray(jnp.asarray(rng.normal(size=n), jnp.bfloat16), np.float32),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(("n", "k"), [(20, 4), (300, 13), (3000, 16), (3000, 256), (30000, 16)])
def test_as_good_as_the_exact_algorithm(name, n, k, rng):
    values = DATA[name](rng, n).astype(np.float32)
    assert mse(values, kmeans1d(jnp.asarray(values), k)) <= 1.001 * exact_mse(values, k) + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4, 8, 16, 64, 256])
def test_as_good_as_the_exact_algorithm_on_1e5_values(k, rng):
    values = rng.normal(size=100_000).astype(np.float32)
    assert mse(values, kmeans1d(jnp.asarray(values), k)) <= 1.001 * exact_mse(values, k)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_a_million_normal_values_reach_lloyd_max(bits, rng):
    values = rng.normal(size=1_000_000).astype(np.float32)
    assert mse(values, kmeans1d(jnp.asarray(values), 2**bits)) == pytest.approx(LLOYD_MAX[bits], rel=0.01)


def test_weights_are_repetitions(rng):
    values = rng.normal(size=200).astype(np.float32)
    times = rng.integers(0, 5, 200)
    ours = kmeans1d(jnp.asarray(values), 7, weights=jnp.asarray(times, jnp.float32))
    assert mse(values, ours, times) == pytest.approx(exact_mse(np.repeat(values, times), 7), rel=1e-4)


def test_weights_against_sklearn(rng):
    values = rng.normal(size=2000).astype(np.float32)
    weights = rng.exponential(size=2000).astype(np.float32)
    ours = kmeans1d(jnp.asarray(values), 8, weights=jnp.asarray(weights))
    peer = KMeans(8, n_init=10, random_state=0).fit(values[:, None], sample_weight=weights)
    assert mse(values, ours, weights) <= 1.0001 * mse(values, peer.cluster_centers_[:, 0], weights)


@pytest.mark.parametrize("pad", [1e6, -1e6, np.nan])
def test_padding_changes_nothing(pad, rng):
    values = rng.normal(size=100).astype(np.float32)
    padded = jnp.asarray(np.concatenate([values, np.full(28, pad, np.float32)]))
    weights = jnp.asarray(np.concatenate([np.ones(100, np.float32), np.zeros(28, np.float32)]))
    expected = kmeans1d(jnp.asarray(values), 5)
    np.testing.assert_allclose(kmeans1d(padded, 5, weights=weights), expected, atol=1e-6)
    np.testing.assert_allclose(kmeans1d(padded, 5, count=100), expected, atol=1e-6)
    np.testing.assert_allclose(kmeans1d(padded, 5, weights=jnp.ones(128), count=100), expected, atol=1e-6)


def test_sorting_by_bits_is_sorting(rng):
    special = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38]
    values = np.append(rng.standard_cauchy(size=500), special).astype(np.float32)
    np.testing.assert_array_equal(ascending(jnp.asarray(values)), np.sort(values))


def test_no_values():
    with pytest.raises(ValueError, match="`values` must hold at least one number to cluster, got none"):
        kmeans1d(jnp.zeros(0), 4)


@pytest.mark.parametrize("n", [8, 2000])
def test_fewer_distinct_values_than_entries(n):
    values = jnp.asarray(np.resize([3.0, -1.0, 2.0], n), jnp.float32)
    codebook = kmeans1d(values, 6)
    assert set(np.asarray(codebook).tolist()) == {-1.0, 2.0, 3.0}
    np.testing.assert_array_equal(codebook[nearest1d(values, codebook)], values)


@pytest.mark.parametrize("n", [8, 2000])
def test_one_entry_is_the_mean(n, rng):
    values = rng.normal(size=n).astype(np.float32)
    np.testing.assert_allclose(kmeans1d(jnp.asarray(values), 1), [values.mean(dtype=np.float64)], atol=1e-6)


def test_constant_values():
    np.testing.assert_array_equal(kmeans1d(jnp.full(1000, 2.5), 4), [2.5] * 4)


def test_same_under_vmap_and_jit(rng):
    rows = jnp.asarray(rng.normal(size=(3, 700)), jnp.float32)
    one_by_one = np.stack([kmeans1d(row, 8) for row in rows])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda row: kmeans1d(row, 8)))(rows), one_by_one)


@pytest.mark.parametrize("k", [1, 2, 20, 100])
def test_nearest1d_is_the_nearest(k, rng):
    values = rng.normal(size=500).astype(np.float32)
    codebook = np.sort(rng.normal(size=k)).astype(np.float32)
    distance = np.abs(values[:, None].astype(np.float64) - codebook)
    chosen = np.asarray(nearest1d(jnp.asarray(values), jnp.asarray(codebook)))
    np.testing.assert_allclose(distance[np.arange(500), chosen], distance.min(axis=1), atol=1e-6)


def test_nearest1d_gives_ties_to_the_lower_index():
    np.testing.assert_array_equal(nearest1d(jnp.array([0.5, 1.0]), jnp.array([0.0, 1.0, 1.0])), [0, 1])


def test_thin_keeps_extremes_and_weight(rng):
    values = rng.normal(size=100_003).astype(np.float32)
    values[[7, 100_002]] = [-90, 80]
    x, w = thin(jnp.asarray(values), jnp.ones(values.size), 10)
    assert x.size == 3 * 10_001
    assert (float(x[w > 0].min()), float(x[w > 0].max())) == (-90, 80)
    assert float(w.sum()) == values.size
    assert np.average(np.asarray(x, np.float64) ** 2, weights=np.asarray(w)) == pytest.approx(
        np.mean(values.astype(np.float64) ** 2), rel=0.02
    )


def test_thin_clusters_like_all_values(rng):
    values = rng.normal(size=400_000).astype(np.float32)
    x, w = thin(jnp.asarray(values), jnp.ones(values.size), 8)
    whole, sample = kmeans1d(jnp.asarray(values), 16), kmeans1d(x, 16, weights=w)
    assert mse(values, sample) <= 1.002 * mse(values, whole)


@pytest.mark.parametrize(("n", "k"), [(3000, 512), (20_000, 2048), (6000, 2048), (900, 900), (900, 1000), (1500, 1400)])
def test_many_entries(n, k, rng):
    values = rng.normal(size=n).astype(np.float32)
    ours = kmeans1d(jnp.asarray(values), k)
    assert mse(values, ours) <= (1.001 if k <= 1024 else 1.17) * exact_mse(values, min(k, n)) + 1e-12
