import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.cluster.buckets import bucket, map_problems, pad_problems


@pytest.mark.parametrize(
    ("n", "size"), [(1, 1), (2, 4), (4, 4), (5, 16), (300, 1024), (2**22, 2**22), (2**22 + 1, 2**23)]
)
def test_bucket(n, size):
    assert bucket(n) == size


@pytest.mark.parametrize(
    ("problems", "n", "shape"),
    [
        (3, 5, (2**12, 2**10)),
        (9000, 5, (2**18, 2**4)),
        (3, 300, (2**12, 2**10)),
        (5000, 300, (2**14, 2**10)),
        (2, 2**23, (4, 2**23)),
    ],
)
def test_several_problems_of_a_size_share_a_shape(problems, n, shape):
    points = jax.ShapeDtypeStruct((problems, n), jnp.float32)
    padded, _ = jax.eval_shape(pad_problems, points, None)
    assert padded.shape == shape


@pytest.mark.parametrize(("n", "size"), [(5, 512), (600, 2**16), (70_000, 2**18), (2**23, 2**23)])
def test_small_problems_alone_share_a_shape(n, size):
    padded, _ = jax.eval_shape(pad_problems, jax.ShapeDtypeStruct((1, n), jnp.float32), None)
    assert padded.shape == (1, size)


def test_padding_has_no_weight():
    points, weights = pad_problems(jnp.ones((3, 500, 2)), jnp.ones((3, 500)))
    assert points.shape[:2] == weights.shape
    assert float(weights.sum()) == 1500
    assert float(points.sum()) == 3000


@pytest.mark.parametrize("at_once", [1, 3, 4, 100])
def test_only_real_problems_are_solved(at_once):
    rows = jnp.arange(16.0).reshape(8, 2)
    sums = map_problems(jnp.sum, jnp.int32(5), at_once, rows)
    np.testing.assert_array_equal(sums[:5], rows[:5].sum(axis=1))
    solved = min(8, -(-5 // at_once) * at_once)
    np.testing.assert_array_equal(sums[solved:], 0)
