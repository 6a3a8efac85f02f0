import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from jaxvq.cluster.kmeans import (
    iterate,
    kmeans,
    lloyd,
    moments_by_kernels,
    one_hot_sums,
    roughly_nearest,
    split_for_empty,
    sums_by_code,
)
from jaxvq.ops import cuda
from jaxvq.ops.nearest import first_smallest, nearest


def distortion(points, centroids, weights=None):
    """Mean weighted squared distance to the nearest centroid, in float64."""
    difference = np.asarray(points, np.float64)[:, None, :] - np.asarray(centroids, np.float64)[None]
    squares = difference**2 if weights is None else np.asarray(weights, np.float64)[:, None, :] * difference**2
    return squares.sum(axis=-1).min(axis=1).mean()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("f")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(("n", "d", "k", "iterations"), [(2000, 8, 32, 10), (3000, 2, 64, 20), (1500, 1, 8, 5)])
def test_error_equals_scikit_learn(n, d, k, iterations, offset):
    points = normal(n, n, d) + np.float32(offset)
    ours = kmeans(jnp.asarray(points), jnp.asarray(points[:k]), iterations=iterations)
    peer = KMeans(k, init=points[:k].astype(float), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    peer.fit(points.astype(float))
    np.testing.assert_allclose(distortion(points, ours), distortion(points, peer.cluster_centers_), rtol=0.005)


def test_one_iteration_moves_to_the_weighted_means():
    points, weights = jnp.array([[0.0], [2.0], [8.0], [9.0]]), jnp.array([3.0, 1.0, 1.0, 1.0])
    centroids = kmeans(points, jnp.array([[1.0], [8.0]]), weights=weights, iterations=1)
    np.testing.assert_allclose(centroids, [[0.5], [8.5]], atol=1e-6)


def test_importance_per_coordinate():
    points, start = normal(0, 800, 3), normal(1, 16, 3)
    weights = np.random.default_rng(2).uniform(0.01, 4, size=(800, 3)).astype("f")
    centroids = start.astype(float)
    for _ in range(6):
        squares = weights[:, None] * (points[:, None].astype(float) - centroids[None]) ** 2
        codes = squares.sum(-1).argmin(1)
        centroids = np.stack([np.average(points[codes == c], axis=0, weights=weights[codes == c]) for c in range(16)])
    ours = kmeans(jnp.asarray(points), jnp.asarray(start), weights=jnp.asarray(weights), iterations=6)
    np.testing.assert_allclose(ours, centroids, atol=1e-4)


def test_padding_changes_nothing():
    points, start = jnp.asarray(normal(3, 1000, 4)), jnp.asarray(normal(4, 64, 4))
    padded = jnp.concatenate([points, jnp.full((9000, 4), 77.0)])
    expected = kmeans(points, start, iterations=4)
    by_weight = kmeans(padded, start, weights=jnp.arange(10_000) < 1000, iterations=4)
    fit = jax.jit(lambda count: kmeans(padded, start, iterations=4, count=count))
    np.testing.assert_allclose(by_weight, expected, atol=1e-5)
    np.testing.assert_allclose(fit(1000), expected, atol=1e-5)
    assert np.isfinite(fit(0)).all()


def test_the_error_never_rises():
    points, centroids = jnp.asarray(normal(5, 1000, 2)), jnp.asarray(normal(6, 20, 2))
    errors = [distortion(points, kmeans(points, centroids, iterations=i)) for i in range(6)]
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_empty_clusters_split_the_most_populated_ones():
    points = jnp.asarray(np.concatenate([normal(7, 500, 2), normal(8, 100, 2) + 20]))
    start = jnp.array([[0.0, 0.0], [20.0, 20.0], [500.0, 0.0], [-500.0, 0.0]])
    centroids = kmeans(points, start, iterations=1)
    width = np.sqrt(np.asarray(points[:500]).var(axis=0).mean())
    np.testing.assert_allclose((centroids[2] - centroids[0]) / 2, [0.5 * width] * 2, atol=1e-4)
    np.testing.assert_allclose((centroids[2] + centroids[0]) / 2, points[:500].mean(axis=0), atol=1e-4)
    assert np.abs(centroids[3] - points[500:].mean(axis=0)).max() < 1
    assert distortion(points, centroids) < distortion(points, start)


def test_the_halves_lie_half_a_deviation_on_either_side():
    variance, mass = jnp.array([4.0, 0.0, 0.0]), jnp.array([9.0, 1.0, 0.0])
    centroids = split_for_empty(jnp.array([[1.0], [2.0], [3.0]]), variance, mass)
    np.testing.assert_allclose(centroids, [[0.0], [2.0], [2.0]])


def test_every_centroid_is_used_in_the_end():
    points = normal(9, 600, 2)
    start = np.full((32, 2), 5.0, "f") + normal(10, 32, 2) * 0.01
    centroids = np.asarray(kmeans(jnp.asarray(points), jnp.asarray(start), iterations=30))
    codes = ((points[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
    assert len(set(codes.tolist())) == 32


def test_fewer_distinct_points_than_centroids():
    points = jnp.tile(jnp.array([[1.0, 2.0], [3.0, 4.0]]), (50, 1))
    centroids = kmeans(points, points[:8], iterations=5)
    assert np.isfinite(centroids).all()
    assert distortion(points, centroids) < 1e-10


def test_same_bits_under_jit_and_vmap_agrees():
    points, start = jnp.asarray(normal(11, 3, 500, 4)), jnp.asarray(normal(12, 3, 8, 4))
    plain = jnp.stack([kmeans(p, s, iterations=3) for p, s in zip(points, start, strict=True)])
    fit = jax.jit(lambda p, s: kmeans(p, s, iterations=3))
    np.testing.assert_array_equal(fit(points[0], start[0]), plain[0])
    mapped = jax.vmap(lambda p, s: kmeans(p, s, iterations=3))(points, start)
    np.testing.assert_allclose(mapped, plain, atol=1e-5)


def test_narrow_points_are_summed_in_float32():
    points = jnp.asarray(normal(13, 70_000, 1)).astype(jnp.bfloat16)
    centroids = kmeans(points, jnp.zeros((1, 1), jnp.bfloat16), iterations=1)
    assert centroids.dtype == jnp.float32
    np.testing.assert_allclose(centroids[0, 0], np.asarray(points, np.float64).mean(), atol=1e-5)


def test_tolerance_stops_early_and_zero_does_not():
    points, start = jnp.asarray(normal(20, 2000, 2)), jnp.asarray(normal(21, 16, 2))
    fit = functools.partial(kmeans, points, start, iterations=60)
    steps = [np.asarray(kmeans(points, start, iterations=i)) for i in (1, 60)]
    errors = [distortion(points, c) for c in (steps[0], fit(tolerance=0.01), fit(tolerance=1e-4), steps[1])]
    np.testing.assert_array_equal(fit(), steps[1])
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[2] < 1.01 * errors[3]


def test_the_distortion_is_that_of_the_means():
    points, start = normal(22, 900, 3), normal(23, 10, 3)
    weights = np.random.default_rng(24).uniform(0.5, 2, size=900).astype("f")
    _, total = lloyd(jnp.asarray(points), jnp.asarray(start), jnp.asarray(weights), 1, 900, 0.0)
    codes = ((points[:, None].astype(float) - start) ** 2).sum(-1).argmin(1)
    means = np.stack([np.average(points[codes == c], axis=0, weights=weights[codes == c]) for c in range(10)])
    expected = (weights[:, None] * (points.astype(float) - means[codes]) ** 2).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_points_spread_over_devices_give_the_codebook_of_one_device():
    points, start = jnp.asarray(normal(25, 4000, 4)), jnp.asarray(normal(26, 32, 4))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    fit = jax.shard_map(
        lambda points, start: kmeans(points, start, iterations=10, axis_name="data"),
        mesh=mesh,
        in_specs=(spec, jax.sharding.PartitionSpec()),
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )
    spread = jax.jit(fit)(jax.device_put(points, jax.sharding.NamedSharding(mesh, spec)), start)
    alone = kmeans(points, start, iterations=10)
    np.testing.assert_allclose(spread, alone, atol=1e-5)
    np.testing.assert_array_equal(nearest(points, spread), nearest(points, alone))


def add_by_hand(values, codes, scales, table):
    """What `kernels/sums.cu` does, in numpy: whole numbers of 64 bits, as halves."""
    whole = np.zeros(table.shape[:-1], np.int64)
    np.add.at(whole[0], np.asarray(codes), np.rint(np.asarray(values * scales, np.float64)).astype(np.int64))
    return whole.view(np.uint32).reshape(table.shape)


def test_points_spread_over_devices_give_the_bits_of_one_device_by_the_kernels(monkeypatch):
    def launch(name, constants, result, *operands, **_):
        if name == "sums":
            values, codes, scales, _, table = operands
            return jax.pure_callback(add_by_hand, result, values, codes, scales, table)
        return first_smallest(((operands[0][None] - operands[1][:, None]) ** 2).sum(-1))

    monkeypatch.setattr(cuda, "launch", launch)
    # The largest points are all on one device: both must scale by them.
    points = jnp.asarray(np.concatenate([normal(27, 500, 4), 100 * normal(28, 500, 4)]))
    start = points[::40]

    def fit(points, axis_name):
        way = {"moments_by": moments_by_kernels, "axis_name": axis_name}
        sizes = jnp.int32(8), jnp.int32(len(points)), jnp.float32(0)
        return iterate(points, start, jnp.ones(len(points)), *sizes, **way)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(
        lambda points: fit(points, "data"), mesh=mesh, in_specs=spread, out_specs=whole, check_vma=False
    )
    alone, together = jax.jit(lambda points: fit(points, None))(points), jax.jit(sharded)(points)
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_errors():
    points, start = jnp.zeros((4, 2)), jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"`centroids` \[k, d\] with the same d .*got \(4, 2\) and \(3, 1\)"):
        kmeans(points, start[:, :1], iterations=1)
    with pytest.raises(ValueError, match=r"`weights` must be \(4,\) or \(4, 2\) like `points`, got \(3,\)"):
        kmeans(points, start, weights=jnp.ones(3), iterations=1)
    with pytest.raises(ValueError, match=r"`points` must hold at least one point to cluster, got \(0, 2\)"):
        kmeans(points[:0], start, iterations=1)


def test_sums_by_code_on_every_backend():
    values, codes = normal(14, 5000, 3), np.random.default_rng(15).integers(0, 100, size=5000).astype(np.int32)
    expected = np.zeros((100, 3))
    np.add.at(expected, codes, values.astype(float))
    for sums in (sums_by_code, one_hot_sums):
        np.testing.assert_allclose(sums(jnp.asarray(values), jnp.asarray(codes), 100), expected, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 2, 13, 1000])
def test_roughly_nearest_loses_next_to_nothing(k, weighted):
    points, centroids = normal(16, 2000, 2), normal(17, k, 2)
    weights = np.random.default_rng(18).uniform(0.1, 2, size=(2000, 2)).astype("f") if weighted else None
    given = None if weights is None else jnp.asarray(weights)
    codes = np.asarray(
        roughly_nearest(jnp.asarray(points).T, jnp.asarray(centroids), None if given is None else given.T)
    )
    squares = (1 if weights is None else weights[:, None]) * (points[:, None].astype(float) - centroids) ** 2
    distances = squares.sum(-1)
    lost = distances[np.arange(2000), codes] - distances.min(1)
    assert (lost <= k / 2**22 * distances.min(1) + 1e-5).all()
    assert lost.mean() <= 1e-4 * distances.min(1).mean()


def test_roughly_nearest_at_distance_zero_and_beyond_float32():
    assert roughly_nearest(jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]), None).tolist() == [1, 1]
    assert int(roughly_nearest(jnp.full((2, 1), 1e30), jnp.eye(2), None)[0]) < 2
