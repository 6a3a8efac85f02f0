"""The kernels of k-means against the plain programs: `pytest -m gpu` on a machine with an NVIDIA GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxvq.cluster import kmeans as lloyd
from jaxvq.cluster.palettes import fit_palettes
from jaxvq.cluster.product import fit_product
from jaxvq.cluster.scalar import kmeans1d
from jaxvq.ops import clustering, cuda
from jaxvq.ops.nearest import nearest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no NVIDIA GPU"),
    pytest.mark.skipif(cuda.compiler() is None, reason="NVRTC is not installed"),
]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("f")


def squared_distances(points, codebook):
    x, c = np.asarray(points, np.float64), np.asarray(codebook, np.float64)
    return (x**2).sum(1)[:, None] - 2 * x @ c.T + (c**2).sum(1)


def palette_error(values, codebook):
    x, c = np.sort(np.asarray(values, np.float64)), np.sort(np.asarray(codebook, np.float64))
    cuts = [0, *np.searchsorted(x, (c[1:] + c[:-1]) / 2, side="right"), len(x)]
    return sum(((x[a:b] - v) ** 2).sum() for a, b, v in zip(cuts[:-1], cuts[1:], c, strict=True))


SHAPES = [
    (1, 2, 1),
    (1000, 8, 256),
    (777, 4, 100),
    (513, 9, 37),
    (300, 2, 512),
    (2000, 16, 1000),
    (3000, 8, 5000),
    (400, 18, 70),
    (500, 64, 64),
    (100, 33, 7),
    (300, 64, 1100),
    (100, 85, 3000),
]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_nearest_has_the_digits_of_float32(n, d, k, offset):
    points, codebook = normal(n, n, d) + np.float32(offset), normal(k, k, d) + np.float32(offset)
    codes = np.asarray(nearest(points, codebook))
    distances = squared_distances(points - points.mean(0), codebook - points.mean(0))
    lost = distances[np.arange(n), codes] - distances.min(1)
    assert codes.shape == (n,)
    assert codes.dtype == np.int32
    assert lost.max() <= 1e-4 * distances.min(1).mean() + (1e-5 if offset else 0)


def test_the_kernel_is_what_runs():
    text = jax.jit(nearest).lower(jnp.ones((64, 8)), jnp.ones((16, 8))).compile().as_text()
    assert "__gpu$xla.gpu.ptx" in text


def test_ties_go_to_the_lower_index():
    codebook = np.tile(normal(0, 5, 8), (40, 1))
    np.testing.assert_array_equal(nearest(codebook[:5], codebook), np.arange(5))
    assert (np.asarray(nearest(np.zeros((9, 8), "f"), np.zeros((300, 8), "f"))) == 0).all()


@pytest.mark.parametrize("d", [8, 64])
def test_nan_has_code_0(d):
    points, codebook = normal(23, 100, d), normal(24, 40, d)
    expected = np.asarray(nearest(points, codebook)).copy()
    points[3, d // 2], expected[3] = np.nan, 0
    np.testing.assert_array_equal(nearest(points, codebook), expected)


def test_no_points_have_no_codes():
    assert nearest(np.zeros((0, 8), "f"), normal(25, 40, 8)).shape == (0,)


def test_values_of_very_different_sizes():
    points, codebook = normal(1, 500, 8), normal(2, 64, 8)
    for scale in (2.0**-55, 2.0**-20, 2.0**20, 2.0**50):
        np.testing.assert_array_equal(
            nearest(points * np.float32(scale), codebook * np.float32(scale)), nearest(points, codebook)
        )
    with_outlier = np.concatenate([points, np.full((1, 8), 1e4, "f")])
    codes = np.asarray(nearest(with_outlier, np.concatenate([codebook, with_outlier[-1:]])))
    distances = squared_distances(points, codebook)
    assert codes[-1] == 64
    assert (distances[np.arange(500), codes[:500]] <= 1.05 * distances.min(1)).all()


@pytest.mark.parametrize(("n", "e", "k"), [(1, 1, 1), (5000, 10, 256), (70_000, 3, 4), (333, 130, 50)])
def test_sums_by_code_lose_nothing(n, e, k):
    values, codes = normal(3, n, e), np.random.default_rng(4).integers(0, k, n).astype(np.int32)
    expected = np.zeros((k, e))
    np.add.at(expected, codes, values.astype(np.float64))
    sums = jax.jit(lambda v, c: clustering.sums_by_code(v, c, k, scales=clustering.sum_scales(v)))
    got = sums(jnp.asarray(values), jnp.asarray(codes))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * max(1, n / k) ** 0.5)
    order = np.random.default_rng(5).permutation(n)
    np.testing.assert_array_equal(sums(jnp.asarray(values[order]), jnp.asarray(codes[order])), got)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(5000, 8, 64), (4000, 4, 256), (3000, 1, 16), (20_000, 40, 32)])
def test_lloyd_ends_where_the_plain_program_ends(n, d, k, weighted):
    points = normal(6, n, d)
    weights = np.random.default_rng(7).uniform(0.1, 2, n).astype("f") if weighted else np.ones(n, "f")
    start = jnp.asarray(points[:k])
    both = [
        jax.jit(functools.partial(lloyd.iterate, moments_by=way, axis_name=None))(
            points, start, weights, 10, n - 100, 0.0
        )
        for way in (lloyd.moments_by_kernels, lloyd.moments_by_chunks)
    ]
    (ours, ours_distortion), (plain, plain_distortion) = both
    np.testing.assert_allclose(ours_distortion, plain_distortion, rtol=2e-3)
    np.testing.assert_allclose(ours.mean(0), plain.mean(0), atol=0.02)


def test_the_same_points_give_the_same_bits():
    points = jnp.asarray(normal(8, 200_000, 8))
    fit = functools.partial(lloyd.kmeans, points, points[:512], iterations=10)
    np.testing.assert_array_equal(fit(), fit())


def test_the_order_of_the_points_does_not_matter():
    points = normal(9, 50_000, 4)
    shuffled = points[np.random.default_rng(10).permutation(len(points))]
    fit = functools.partial(lloyd.kmeans, centroids=jnp.asarray(points[:64]), iterations=10)
    np.testing.assert_array_equal(fit(jnp.asarray(points)), fit(jnp.asarray(shuffled)))


ROWS = {
    "normal": lambda r, n: r.standard_normal((3, n)),
    "heavy tails": lambda r, n: r.standard_t(3, (3, n)),
    "few values": lambda r, n: np.round(3 * r.standard_normal((3, n))),
    "outliers": lambda r, n: np.where(r.random((3, n)) < 3 / n, 50, 1) * r.standard_normal((3, n)),
    "one value": lambda r, n: np.full((3, n), 2.5),
    "far from zero": lambda r, n: 1000 + 0.01 * r.standard_normal((3, n)),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(("n", "k"), [(4096, 16), (300, 16), (5, 16), (20_000, 100), (1000, 1), (1000, 2)])
def test_palettes_are_optimal_to_a_thousandth(kind, n, k):
    rows = ROWS[kind](np.random.default_rng(11), n).astype("f")
    got = np.asarray(fit_palettes(rows, k))
    assert (np.diff(got, axis=1) >= 0).all()
    for row, codebook in zip(rows, got, strict=True):
        assert palette_error(row, codebook) <= 1.001 * palette_error(row, kmeans1d(jnp.asarray(row), k)) + 1e-9


@pytest.mark.parametrize(("rows", "n", "k"), [(700, 600, 16), (3, 30_000, 256), (2, 40_000, 1024)])
def test_palettes_of_many_rows_and_of_many_entries(rows, n, k):
    values = normal(18, rows, n)
    got = np.asarray(fit_palettes(values, k))
    for row in {0, 1, rows // 2, rows - 1}:
        least = palette_error(values[row], kmeans1d(jnp.asarray(values[row]), k))
        assert palette_error(values[row], got[row]) <= 1.001 * least


def test_weights_of_very_different_sizes_on_few_values():
    generator = np.random.default_rng(19)
    values = np.round(3 * generator.standard_normal((2, 2000))).astype("f")
    weights = (10 ** generator.uniform(-6, 0, (2, 2000))).astype("f")
    got = np.asarray(fit_palettes(values, 8, weights=weights))
    for x, w, codebook in zip(values, weights.astype(np.float64), got, strict=True):
        plain = np.asarray(kmeans1d(jnp.asarray(x), 8, weights=jnp.asarray(w, jnp.float32)))
        ours, theirs = ((w * ((x[:, None] - c.astype(np.float64)) ** 2).min(1)).sum() for c in (codebook, plain))
        assert ours <= 1.001 * theirs + 1e-9


def test_several_sets_of_vectors():
    sets = jnp.asarray(normal(20, 5, 3000, 4))
    together = fit_product(jax.random.key(0), sets, 32, iterations=10)
    alone = [fit_product(jax.random.key(i), x[None], 32, iterations=10)[0] for i, x in enumerate(sets)]
    for x, ours, theirs in zip(np.asarray(sets), together, alone, strict=True):
        ours, theirs = (squared_distances(x, codebook).min(1).mean() for codebook in (ours, theirs))
        assert ours <= 1.05 * theirs


def test_bfloat16_points_are_clustered_as_the_float32_values_they_are():
    points = jnp.asarray(normal(21, 5000, 8), jnp.bfloat16)
    exact = points.astype(jnp.float32)
    np.testing.assert_array_equal(nearest(points, exact[:64]), nearest(exact, exact[:64]))
    np.testing.assert_array_equal(
        lloyd.kmeans(points, exact[:64], iterations=5), lloyd.kmeans(exact, exact[:64], iterations=5)
    )


def test_programs_of_64_bit_mode():
    points = normal(22, 2000, 8)
    expected = (
        nearest(points, points[:100]),
        lloyd.kmeans(points, points[:100], iterations=5),
        fit_palettes(points.T, 8),
    )
    with jax.enable_x64(True):
        got = nearest(points, points[:100]), lloyd.kmeans(points, points[:100], iterations=5), fit_palettes(points.T, 8)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_padding_and_importance_of_palettes():
    rows = normal(12, 4, 1000)
    padded = np.pad(rows, ((0, 3), (0, 500)), constant_values=9.0)
    by_count = fit_palettes(padded, 8, problems=4, count=1000)[:4]
    by_weight = fit_palettes(padded, 8, weights=(np.arange(1500) < 1000) * np.ones((7, 1), "f"))[:4]
    np.testing.assert_allclose(by_count, fit_palettes(rows, 8), atol=1e-6)
    np.testing.assert_allclose(by_weight, by_count, atol=1e-4)
    times = np.random.default_rng(13).integers(1, 5, 1000)
    repeated = fit_palettes(np.repeat(rows[:1], times, axis=1), 8)
    weighted = fit_palettes(rows[:1], 8, weights=times[None].astype("f"))
    errors = [palette_error(np.repeat(rows[0], times), codebook[0]) for codebook in (repeated, weighted)]
    assert abs(errors[0] / errors[1] - 1) < 1e-3


def test_kernels_run_inside_loops_and_maps():
    points, codebook = jnp.asarray(normal(14, 3, 400, 8)), jnp.asarray(normal(15, 3, 32, 8))
    one_by_one = np.stack([nearest(x, c) for x, c in zip(points, codebook, strict=True)])
    np.testing.assert_array_equal(jax.vmap(nearest)(points, codebook), one_by_one)
    np.testing.assert_array_equal(lax.map(lambda both: nearest(*both), (points, codebook)), one_by_one)


@pytest.mark.skipif(jax.device_count() < 2, reason="one device")
def test_points_spread_over_gpus_give_the_bits_of_one():
    points, start = jnp.asarray(normal(16, 400_000, 8)), jnp.asarray(normal(17, 256, 8))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    fit = jax.shard_map(
        lambda points, start: lloyd.kmeans(points, start, iterations=20, axis_name="data"),
        mesh=mesh,
        in_specs=(spread, whole),
        out_specs=whole,
        check_vma=False,
    )
    together = jax.jit(fit)(jax.device_put(points, jax.sharding.NamedSharding(mesh, spread)), start)
    alone = lloyd.kmeans(points, start, iterations=20)
    np.testing.assert_array_equal(np.asarray(together), np.asarray(alone))
    np.testing.assert_array_equal(nearest(points, np.asarray(together)), nearest(points, alone))
