import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.vq import vq as scipy_vq

from jaxvq.array import Affine, QuantizedArray
from jaxvq.bits import zero_codes
from jaxvq.layout import Layout
from jaxvq.ops.nearest import nearest, vq

QUANTIZED = QuantizedArray(zero_codes(3, 2, 1, 4), Affine(jnp.ones((1, 1, 1))), Layout.of((3, 2), "float32"))


def brute_force(points, codebook, weights=None):
    """Codes and squared distances in float64."""
    difference = np.asarray(points, np.float64)[:, None, :] - np.asarray(codebook, np.float64)[None]
    squares = difference**2 if weights is None else np.asarray(weights, np.float64)[:, None, :] * difference**2
    distances = squares.sum(axis=-1)
    return distances.argmin(axis=1), distances


@pytest.mark.parametrize(
    ("n", "k", "d"), [(0, 3, 2), (1, 1, 1), (7, 16, 3), (1000, 13, 4), (5000, 256, 8), (300, 2000, 2)]
)
def test_equals_brute_force(n, k, d):
    rng = np.random.default_rng(n)
    points, codebook = rng.normal(size=(n, d)).astype("f"), rng.normal(size=(k, d)).astype("f")
    codes = nearest(jnp.asarray(points), jnp.asarray(codebook))
    assert codes.dtype == jnp.int32
    assert codes.shape == (n,)
    np.testing.assert_array_equal(codes, brute_force(points, codebook)[0])


@pytest.mark.parametrize("d", [1, 3])
def test_weighted_distance(d):
    rng = np.random.default_rng(0)
    points, codebook = rng.normal(size=(500, d)).astype("f"), rng.normal(size=(32, d)).astype("f")
    weights = rng.uniform(0.01, 4, size=(500, d)).astype("f")
    codes = nearest(jnp.asarray(points), jnp.asarray(codebook), weights=jnp.asarray(weights))
    np.testing.assert_array_equal(codes, brute_force(points, codebook, weights)[0])


def test_far_from_the_origin():
    rng = np.random.default_rng(1)
    points = (rng.normal(size=(2000, 8)) + 1000).astype("f")
    codebook = (rng.normal(size=(64, 8)) + 1000).astype("f")
    np.testing.assert_array_equal(nearest(jnp.asarray(points), jnp.asarray(codebook)), brute_force(points, codebook)[0])


def test_a_tie_goes_to_the_lowest_index():
    points = jnp.array([[0.0, 0.0], [3.0, 1.0]])
    codebook = jnp.array([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert nearest(points, codebook).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_narrow_dtypes_are_compared_in_float32(dtype):
    rng = np.random.default_rng(2)
    points = jnp.asarray(rng.normal(size=(3000, 4)) * 20).astype(dtype)
    codebook = jnp.asarray(rng.normal(size=(200, 4)) * 20).astype(dtype)
    codes = np.asarray(nearest(points, codebook))
    _, distances = brute_force(np.asarray(points, "f"), np.asarray(codebook, "f"))
    np.testing.assert_allclose(distances[np.arange(3000), codes], distances.min(axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("d", [1, 3])
def test_nan_gets_code_0(d, weighted):
    rng = np.random.default_rng(5)
    points, codebook = rng.normal(size=(40, d)).astype("f"), rng.normal(size=(20, d)).astype("f")
    weights = np.ones_like(points) if weighted else None
    expected = brute_force(points, codebook)[0]
    points[7, -1], expected[7] = np.nan, 0
    assert expected.any()
    np.testing.assert_array_equal(nearest(points, codebook, weights=weights), expected)
    codebook[3, 0] = np.nan
    assert not np.asarray(nearest(points, codebook, weights=weights)).any()


@pytest.mark.parametrize("d", [1, 2])
def test_infinity_still_gets_a_code_of_the_codebook(d):
    points = jnp.zeros((3, d)).at[:, 0].set(jnp.array([jnp.inf, -jnp.inf, 3e38]))
    codes = np.asarray(nearest(points, jnp.arange(4.0 * d).reshape(4, d)))
    assert (codes >= 0).all()
    assert (codes < 4).all()


def test_no_points_have_no_codes():
    codes, diff = vq(jnp.zeros((0, 2)), jnp.ones((3, 2)))
    assert codes.shape == diff.shape == (0,)
    assert nearest(jnp.zeros((0, 2)), jnp.ones((3, 2)), weights=jnp.zeros((0, 2))).shape == (0,)


def test_jit_and_vmap_give_the_same_codes():
    points = jax.random.normal(jax.random.key(0), (3, 400, 4))
    codebooks = jax.random.normal(jax.random.key(1), (3, 16, 4))
    plain = jnp.stack([nearest(p, c) for p, c in zip(points, codebooks, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(nearest))(points, codebooks), plain)


@pytest.mark.parametrize("d", [None, 1, 5])
def test_vq_equals_scipy(d):
    rng = np.random.default_rng(3)
    shape = () if d is None else (d,)
    observations, codebook = rng.normal(size=(700, *shape)), rng.normal(size=(30, *shape))
    codes, diff = vq(observations.astype("f"), codebook.astype("f"))
    expected_codes, expected_diff = scipy_vq(observations.astype("f"), codebook.astype("f"))
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(diff, expected_diff, atol=2e-6)


def test_errors():
    points, codebook = jnp.zeros((4, 2)), jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"`points` must be \[n, d\] and `codebook` \[k, d\].*\(4,\)"):
        nearest(jnp.zeros(4), codebook)
    with pytest.raises(ValueError, match=r"same d .*got \(4, 2\) and \(3, 5\)"):
        nearest(points, jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"k of at least 1"):
        nearest(points, jnp.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"`weights` must have the shape of `points` \(4, 2\), got \(4,\)"):
        nearest(points, codebook, weights=jnp.ones(4))
    with pytest.raises(TypeError, match="`codebook` must hold real numbers, got dtype complex64"):
        nearest(points, codebook.astype(jnp.complex64))
    with pytest.raises(ValueError, match=r"`observations` must be"):
        vq(jnp.zeros(4), codebook)
    with pytest.raises(ValueError, match=r"same d of at least 1"):
        nearest(jnp.zeros((4, 0)), jnp.zeros((3, 0)))


@pytest.mark.parametrize("wrong", ["text", None, ["a", "b"], [[1.0], [1.0, 2.0]], QUANTIZED])
@pytest.mark.usefixtures("unchecked")
def test_no_numbers(wrong):
    with pytest.raises(TypeError, match="`points` must hold real numbers, got"):
        nearest(wrong, jnp.zeros((3, 2)))
    with pytest.raises(TypeError, match="`codebook` must hold real numbers, got"):
        vq(jnp.zeros((3, 2)), wrong)


def test_lists():
    assert nearest([[0.1, 0], [0.9, 0]], [[0, 0], [1, 0]]).tolist() == [0, 1]
    assert vq([0.1, 0.9], np.array([0.0, 1.0]))[0].tolist() == [0, 1]


def test_single_values_beside_an_outlier():
    rng = np.random.default_rng(4)
    codebook = np.append(rng.normal(size=255), 1e4).astype("f")[:, None]
    points = np.append(rng.normal(size=3000), [9e3, 2e4]).astype("f")[:, None]
    np.testing.assert_array_equal(nearest(points, codebook), brute_force(points, codebook)[0])


def test_gradient_of_the_distance_at_a_code():
    codebook = jnp.array([[0.0, 0.0], [1.0, 1.0]])
    gradient = jax.grad(lambda points: vq(points, codebook)[1].sum())(jnp.array([[1.0, 1.0], [0.0, 0.3]]))
    np.testing.assert_allclose(gradient, [[0, 0], [0, 1]], atol=1e-6)
