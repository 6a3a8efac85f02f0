import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.cluster.buckets import bucket, map_problems, pad_problems


@pytest.mark.parametrize(
    ("n", "size"), [(1, 1), (2, 4), (4, 4), (5, 16), (300, 1024), (2**22, 2**22), (2**22 + 1, 2**23)]
)
def test_bucket(n, size):
    assert bucket(n) == size


def test_padding_has_no_weight():
    points, weights = pad_problems(jnp.ones((3, 5, 2)), jnp.ones((3, 5)))
    assert points.shape == (4, 16, 2)
    assert weights.shape == (4, 16)
    assert float(weights.sum()) == 15
    assert float(points.sum()) == 30


@pytest.mark.parametrize("at_once", [1, 3, 4, 100])
def test_only_real_problems_are_solved(at_once):
    rows = jnp.arange(16.0).reshape(8, 2)
    sums = map_problems(jnp.sum, jnp.int32(5), at_once, rows)
    np.testing.assert_array_equal(sums[:5], rows[:5].sum(axis=1))
    solved = min(8, -(-5 // at_once) * at_once)
    np.testing.assert_array_equal(sums[solved:], 0)
