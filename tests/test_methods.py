"""The contract that every method keeps, and what each one promises beyond it."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import METHODS
from sklearn.cluster import KMeans as PeerKMeans

from jaxvq import _fit
from jaxvq.array import combine, partition
from jaxvq.methods import KMeans, Product, Residual, RowVQ, Symmetric, Uniform, method_from_json

every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def fit(method, weight, weights=None, **layout_args):
    weight = jnp.asarray(weight)
    layout = method.layout(weight.shape, weight.dtype, **layout_args)
    return method.fit(weight, layout, key=jax.random.key(0), weights=weights)


def error(weight, array) -> float:
    return float(jnp.mean((weight.astype(jnp.float32) - array.dequantize().astype(jnp.float32)) ** 2))


@pytest.fixture
def weight(rng):
    return jnp.asarray(rng.normal(size=(48, 16)), jnp.float32)


@every_method
def test_keeps_its_template(method, weight):
    array = fit(method, weight)
    template = method.template(array.layout)
    assert jax.tree.structure(template) == jax.tree.structure(array)
    described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(template)]
    assert described == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(array)]
    assert template.nbytes == array.nbytes
    array.validate()


@every_method
def test_is_better_than_nothing_in_weights_and_outputs(method, weight, rng):
    decoded = fit(method, weight).dequantize()
    assert decoded.shape == weight.shape
    assert decoded.dtype == weight.dtype
    x = jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)
    if method != Uniform(bits=1, per="channel"):  # two extremes: worse than zeros on a Gaussian, by definition
        assert jnp.mean((weight - decoded) ** 2) < jnp.mean(weight**2)
        assert jnp.mean((x @ weight - x @ decoded) ** 2) < jnp.mean((x @ weight) ** 2)


@every_method
def test_quantizing_again_changes_nothing(method, weight):
    once = fit(method, weight).dequantize()
    twice = fit(method, once).dequantize()
    loose = isinstance(method, (Residual, Symmetric)) or method.to_json().get("codebook_dtype") == "int8"
    if loose:  # their scale depends on more than the set of values
        assert jnp.mean((once - twice) ** 2) <= jnp.mean((weight - once) ** 2)
    else:
        np.testing.assert_allclose(twice, once, atol=2e-2 if "bfloat16" in str(method) else 1e-5)


@every_method
def test_same_bits_jitted_or_not_and_compiles_once(method, weight):
    layout = method.layout(weight.shape, weight.dtype)
    jitted = jax.jit(lambda w, key: method.fit(w, layout, key=key))
    for seed in (0, 3):
        key = jax.random.key(seed)
        eager = method.fit(weight + seed, layout, key=key)
        for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted(weight + seed, key)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert jitted._cache_size() == 1


@every_method
def test_vmap_over_layers(method, weight):
    layout = method.layout(weight.shape, weight.dtype)
    stack = jnp.stack([weight, 2 * weight])
    arrays = jax.vmap(lambda w: method.fit(w, layout, key=jax.random.key(0)))(stack)
    assert arrays.shape == stack.shape
    one = method.fit(weight, layout, key=jax.random.key(0))
    np.testing.assert_allclose(arrays.dequantize()[0], one.dequantize(), atol=1e-5)


@every_method
def test_gradient_reaches_every_trainable_leaf(method, weight):
    trainable, frozen = partition(fit(method, weight))
    grad = jax.grad(lambda t: jnp.sum(combine(t, frozen).dequantize() ** 2))(trainable)
    assert jax.tree.leaves(grad)
    for leaf in jax.tree.leaves(grad):
        assert bool(jnp.all(jnp.isfinite(leaf)))
        assert bool(jnp.any(leaf != 0))


@every_method
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(method, weight, dtype):
    array = fit(method, weight.astype(dtype))
    assert array.dtype == dtype
    assert array.dequantize().dtype == dtype
    assert error(weight.astype(dtype), array) <= 1.1 * error(weight, fit(method, weight)) + 1e-4


@every_method
@pytest.mark.parametrize(
    ("shape", "args"),
    [
        ((3, 3, 5, 8), {}),
        ((8, 5, 3, 3), {"out_axis": 0, "channels_last": False}),
        ((3, 8, 7), {"out_axis": 1}),
        ((8, 21), {"out_axis": 0}),
        ((2, 3, 2, 5, 8), {}),
    ],
    ids=["conv", "torch conv", "conv transpose", "embed", "conv 3d"],
)
def test_any_kind_of_weight(method, shape, args, rng):
    weight = jnp.asarray(rng.normal(size=shape), jnp.float32)
    array = fit(method, weight, **args)
    array.validate()
    assert array.dequantize().shape == shape


@every_method
def test_constant_weight_is_exact(method):
    weight = jnp.full((48, 16), 0.75)
    np.testing.assert_allclose(fit(method, weight).dequantize(), weight, rtol=1e-6)


@every_method
def test_json_round_trip(method):
    assert method_from_json(json.loads(json.dumps(method.to_json()))) == method
    assert hash(method_from_json(method.to_json())) == hash(method)
    assert eval(str(method)) == method


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_uniform_is_its_formula(bits, per, weight):
    w = np.asarray(weight, np.float64)
    axis = None if per == "tensor" else 0
    low, high = w.min(axis, keepdims=True), w.max(axis, keepdims=True)
    step = (high - low) / (2**bits - 1)
    np.testing.assert_allclose(
        fit(Uniform(bits, per), weight).dequantize(), low + step * np.round((w - low) / step), atol=1e-5
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_is_its_formula(bits, weight):
    w = np.asarray(weight, np.float64)
    most = 2 ** (bits - 1) - 1
    scale = (w.max() - w.min()) / (2 * most)
    expected = scale * np.clip(np.round(w / scale), -most, most)
    np.testing.assert_allclose(fit(Symmetric(bits), weight).dequantize(), expected, atol=1e-5)


def test_symmetric_at_one_bit(weight):
    w = np.asarray(weight, np.float64)
    np.testing.assert_allclose(fit(Symmetric(1), weight).dequantize(), np.abs(w).mean() * np.sign(w), rtol=1e-5)


@pytest.mark.parametrize("method", [Uniform(bits=1), Symmetric(bits=1), KMeans(bits=1)], ids=str)
def test_bias_at_one_bit_has_two_values(method, rng):
    bias = jnp.asarray(rng.normal(size=300), jnp.float32)
    array = fit(method, bias, out_axis=None)
    assert len(np.unique(array.dequantize())) == 2
    assert array.codes.nbytes == 40


def test_groups_have_their_own_levels(rng):
    weight = jnp.asarray(rng.normal(size=(64, 4)) * np.repeat([1, 100], 32)[:, None], jnp.float32)
    array = fit(KMeans(bits=2, per=32), weight)
    assert array.decoder.vectors.shape == (2, 4, 1, 4, 1)
    small = weight[:32] - array.dequantize()[:32]
    assert float(jnp.mean(small**2)) < 0.2


def test_padding_of_a_group_is_counted_but_not_clustered(rng):
    weight = jnp.asarray(5 + rng.uniform(size=(20, 3)), jnp.float32)
    array = fit(KMeans(bits=2, per=16), weight)
    assert array.layout.pad == 12
    assert float(array.decoder.vectors.min()) >= 5
    assert array.codes.length == 32


def test_row_vq_keeps_whole_rows(rng):
    weight = jnp.asarray(rng.normal(size=(20, 30)), jnp.float32)
    array = fit(RowVQ(fraction=0.1), weight)
    assert array.decoder.vectors.shape == (1, 1, 1, 3, 20)
    assert len(np.unique(np.asarray(array.dequantize()).T, axis=0)) == 3
    assert RowVQ(fraction=0.1).entries(9) == 1
    assert RowVQ().entries(300) == 30
    assert RowVQ(k=7).entries(300) == 7


def test_row_vq_finds_repeated_rows(rng):
    rows = rng.normal(size=(3, 20)).astype(np.float32)
    weight = jnp.asarray(rows[rng.integers(0, 3, 40)].T)
    np.testing.assert_allclose(fit(RowVQ(k=3), weight).dequantize(), weight, atol=1e-5)


def test_product_of_a_filter_is_one_vector(rng):
    filters = rng.normal(size=(4, 3, 3)).astype(np.float32)
    weight = jnp.asarray(filters[rng.integers(0, 4, (6, 8))].transpose(2, 3, 0, 1))
    array = fit(Product(k=4, dim=9), weight)
    assert array.layout.grid == (6, 8)
    np.testing.assert_allclose(array.dequantize(), weight, atol=1e-5)


def test_product_is_as_good_as_sklearn(rng):
    weight = jnp.asarray(rng.normal(size=(256, 64)), jnp.float32)
    vectors = np.asarray(weight).reshape(64, 4, 64).transpose(0, 2, 1).reshape(-1, 4)
    peer = PeerKMeans(32, n_init=1, max_iter=25, random_state=0).fit(vectors)
    assert error(weight, fit(Product(k=32, dim=4), weight)) <= 1.02 * peer.inertia_ / vectors.size


def test_subspaces_have_their_own_codebooks(rng):
    scales = np.repeat([1.0, 100.0], 4)[:, None]
    weight = jnp.asarray(rng.normal(size=(8, 50)) * scales, jnp.float32)
    own = fit(Product(k=8, dim=4, codebooks="subspace"), weight).dequantize()
    shared = fit(Product(k=8, dim=4), weight).dequantize()
    assert jnp.mean((weight - own)[:4] ** 2) < 0.5 * jnp.mean((weight - shared)[:4] ** 2)


def test_residual_stages_add_up(rng):
    weight = jnp.asarray(rng.normal(size=(128, 32)), jnp.float32)
    errors = [error(weight, fit(Residual(stages=m, bits=4, dim=4), weight)) for m in (1, 2, 3)]
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


@pytest.mark.parametrize("method", [KMeans(k=4), Product(k=8, dim=2), RowVQ(k=4), Residual(k=4, dim=2)], ids=str)
def test_importance_moves_the_error(method, rng):
    weight = jnp.asarray(rng.normal(size=(32, 24)), jnp.float32)
    importance = jnp.asarray(np.where(rng.uniform(size=(32, 24)) < 0.2, 100.0, 0.1), jnp.float32)

    def weighted(array):
        return float(jnp.sum(importance * (weight - array.dequantize()) ** 2))

    assert weighted(fit(method, weight, importance)) < 0.96 * weighted(fit(method, weight))


def test_int8_codebooks_are_close_and_smaller(weight):
    full, small = (
        fit(KMeans(bits=4, per="channel"), weight),
        fit(KMeans(bits=4, per="channel", codebook_dtype="int8"), weight),
    )
    assert small.decoder.vectors.dtype == jnp.int8
    assert full.decoder.vectors.nbytes - small.nbytes + small.codes.nbytes == 16 * 16 * 3 - 16 * 4
    assert error(weight, small) < 1.02 * error(weight, full)


def test_codes_are_those_of_the_stored_codebook(weight):
    array = fit(Product(bits=4, dim=4, codebook_dtype="bfloat16"), weight)
    table = np.asarray(array.decoder.vectors[0, 0, 0], np.float32)
    vectors = np.asarray(array.layout.to_vectors(weight))
    nearest = ((vectors[:, :, None] - table) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(np.asarray(array.unpack())[..., 0], nearest)


BAD = [
    (lambda: Uniform(bits=0), "`bits` must be a whole number from 1 to 8, got 0"),
    (lambda: Symmetric(bits=9), "`bits` must be a whole number from 1 to 8, got 9"),
    (lambda: KMeans(bits=17), "`bits` must be a whole number from 1 to 16, got 17"),
    (lambda: KMeans(bits=4, k=16), "`bits` and `k` exclude each other"),
    (lambda: KMeans(k=0), "`k` must be a whole number from 1 to 65536, got 0"),
    (lambda: KMeans(k=70000), "`k` must be a whole number from 1 to 65536, got 70000"),
    (lambda: KMeans(per=0), '`per` must be "tensor", "channel" or a group size of at least 1, got 0'),
    (lambda: KMeans(codebook_dtype="int4"), "`codebook_dtype` must be one of float32, bfloat16, int8, got 'int4'"),
    (lambda: RowVQ(fraction=0.1, k=3), "`fraction` and `k` exclude each other"),
    (lambda: RowVQ(fraction=1.5), "`fraction` must be above 0 and at most 1, got 1.5"),
    (lambda: method_from_json({"method": ["x"]}), "`method` must be .* one of Uniform.* got {'method': \\['x'\\]}"),
    (lambda: Product(dim=0), "`dim` must be a whole number of at least 1, got 0"),
    (lambda: Residual(stages=0), "`stages` must be a whole number of at least 1, got 0"),
    (lambda: method_from_json({"method": "Kmeans"}), "`method` must be .* one of Uniform, Symmetric, KMeans, RowVQ"),
    (lambda: method_from_json({"method": "KMeans", "bit": 4}), "`KMeans` has no 'bit'; it has bits, k, per"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_choice_of_codebooks():
    # The annotation catches it first under the type-checking hook; without the hook the message is ours.
    with pytest.raises(Exception, match=r"codebooks"):
        Product(codebooks="each")


TOO_MANY = [
    (KMeans(k=800), "number of values that share a codebook, which is 768, got 800"),
    (KMeans(k=64, per="channel"), "number of values that share a codebook, which is 48, got 64"),
    (KMeans(k=32, per=16), "number of values that share a codebook, which is 16, got 32"),
    (RowVQ(k=17), "number of output features that share a codebook, which is 16, got 17"),
    (Product(k=256, dim=4), "number of vectors of 4 values that share a codebook, which is 192, got 256"),
    (Product(k=17, dim=4, codebooks="subspace"), "number of vectors of 4 values that share a codebook, which is 16"),
    (Residual(k=97, dim=8), "number of vectors of 8 values that share a codebook, which is 96, got 97"),
]


@pytest.mark.parametrize(("method", "message"), TOO_MANY, ids=[str(method) for method, _ in TOO_MANY])
def test_more_centroids_than_vectors(method, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        method.template(method.layout((48, 16), "float32"))


def test_fewer_distinct_values_than_entries(rng):
    weight = jnp.asarray(rng.choice([-1.0, 0.0, 2.0], (40, 10)), jnp.float32)
    for method in (KMeans(k=16), Product(k=90, dim=4)):
        array = fit(method, weight)
        array.validate()
        np.testing.assert_allclose(array.dequantize(), weight, atol=1e-6)


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KMeans().bits = 3  # type: ignore[misc]


def test_one_bit_in_slabs(rng):
    weight = jnp.asarray(rng.normal(size=(2**20, 2)), jnp.float32)
    array = fit(Symmetric(bits=1), weight)
    assert array.decoder.scale.shape == (1, 1, 1)
    np.testing.assert_allclose(np.abs(array.dequantize()), np.abs(np.asarray(weight)).mean(), rtol=1e-4)


@pytest.mark.parametrize("per", ["tensor", "channel", 700])
def test_a_large_weight_is_fitted_in_slabs(per, rng):
    # 2100 columns of 700 make two slabs, the second one smaller.
    weight = jnp.asarray(rng.normal(size=(700, 2100)) * (1 + np.arange(2100)), jnp.float32)
    array = fit(Uniform(bits=8, per=per), weight)
    low, high = (
        np.asarray(weight).min(axis=None if per == "tensor" else 0),
        np.asarray(weight).max(axis=None if per == "tensor" else 0),
    )
    assert np.max(np.abs(np.asarray(array.dequantize() - weight)) / ((high - low) / 255)) < 0.501


def test_sampling_does_not_follow_a_period(rng):
    columns = np.where(np.arange(1024) % 32 < 3, 1.0, 0.1)
    weight = jnp.asarray(rng.normal(size=(4200, 1024)) * columns, jnp.float32)
    sampled = fit(KMeans(bits=4), weight)
    whole = fit(KMeans(bits=4), weight[:500])
    assert error(weight, sampled) < 1.02 * error(weight[:500], whole)


def test_importance_of_nothing_is_no_importance(rng):
    weight = jnp.asarray(rng.normal(size=(32, 24)), jnp.float32)
    dead = jnp.ones((32, 24)).at[:, 3].set(0).at[:16, 5].set(0)
    for method in (KMeans(bits=3, per="channel"), KMeans(k=4, per=16), Product(k=16, dim=4)):
        array = fit(method, weight, dead)
        assert float(jnp.mean((weight - array.dequantize()) ** 2)) < 0.5
        np.testing.assert_allclose(
            fit(method, weight, jnp.zeros((32, 24))).dequantize(), fit(method, weight).dequantize(), atol=1e-5
        )


def test_padding_of_a_vector_does_not_count(rng):
    weight = jnp.asarray(rng.normal(size=(9, 64)), jnp.float32)
    method = Product(bits=4, dim=4)
    np.testing.assert_array_equal(
        fit(method, weight).dequantize(), fit(method, weight, jnp.ones(weight.shape)).dequantize()
    )


def test_group_larger_than_the_input_side_is_the_input_side(rng):
    weight = jnp.asarray(rng.normal(size=(9, 64)), jnp.float32)
    array = fit(Uniform(bits=4, per=128), weight)
    assert array.layout.pad == 0
    np.testing.assert_array_equal(array.dequantize(), fit(Uniform(bits=4, per="channel"), weight).dequantize())


@pytest.mark.parametrize("method", [KMeans(bits=11), Product(bits=5, dim=4), Residual(bits=3, dim=4)], ids=str)
def test_works_with_64_bit_types(method, rng):
    weight = rng.normal(size=(64, 48)).astype(np.float32)
    with jax.enable_x64(True):
        array = fit(method, weight)
        assert array.dequantize().dtype == jnp.float32
        array.validate()


@pytest.mark.slow
def test_a_sample_of_vectors_is_as_good_as_all(rng):
    weight = jnp.asarray(rng.normal(size=(3072, 2048)), jnp.float32)
    sampled = error(weight, fit(Product(bits=4, dim=2), weight))
    whole = error(weight[:1000], fit(Product(bits=4, dim=2), weight[:1000]))
    assert sampled < 1.01 * whole


@every_method
def test_no_dtype_is_promoted_by_accident(method, weight):
    with jax.numpy_dtype_promotion("strict"):
        assert fit(method, weight.astype(jnp.bfloat16)).dequantize().dtype == jnp.bfloat16


def test_a_sample_of_vectors_covers_the_weight(monkeypatch):
    monkeypatch.setattr(_fit, "SAMPLE_VECTORS", 100)
    monkeypatch.setattr(_fit, "SAMPLE_VECTORS_PER_ENTRY", 1)
    weight = jnp.arange(157.0)[:, None]
    layout = Product(dim=1).layout(weight.shape, weight.dtype)
    points, _, count = _fit._vector_problems(weight, None, jax.random.key(0), layout=layout, subspaces=False, k=2)
    sampled = np.asarray(points[0, : int(count), 0])
    assert len(set(sampled.tolist())) == 100
    assert np.max(np.diff(sampled)) <= 3
    assert sampled[-1] == 156
