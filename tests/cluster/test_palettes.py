import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.cluster.palettes import fit_palettes
from jaxvq.cluster.scalar import kmeans1d


def rows_of(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("f")


@pytest.mark.parametrize("weighted", [False, True])
def test_each_row_gets_its_own_optimal_palette(weighted):
    rows = rows_of(0, 3, 200)
    weights = np.random.default_rng(1).uniform(0.1, 2, size=(3, 200)).astype("f") if weighted else None
    got = fit_palettes(rows, 4, weights=weights)
    for i, row in enumerate(rows):
        alone = kmeans1d(jnp.asarray(row), 4, weights=None if weights is None else jnp.asarray(weights[i]))
        np.testing.assert_allclose(got[i], alone, atol=1e-6)


def test_rows_and_values_behind_the_counts_are_padding():
    rows = rows_of(2, 2, 60)
    padded = np.pad(rows, ((0, 2), (0, 40)), constant_values=99.0)
    fit = jax.jit(lambda problems, count: fit_palettes(padded, 4, problems=problems, count=count))
    np.testing.assert_allclose(fit(2, 60)[:2], fit_palettes(rows, 4), atol=1e-6)


def test_a_whole_row_of_one_value():
    np.testing.assert_array_equal(fit_palettes(np.full((1, 30), 2.5, "f"), 4), [[2.5] * 4])
