"""Looking up entries, and their gradient against numpy's sums, on the path of every backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.array import Affine, Codebook, QuantizedArray, combine, partition
from jaxvq.bits import pack
from jaxvq.layout import Layout
from jaxvq.ops.lookup import lookup, one_hot_sums, product_sums, scattered_sums, sums_by_entry

# grid (g, out), blocks (#g, #out), entries k, dim d
CASES = {
    "palette per tensor": ((24, 6), (1, 1), 13, 1),
    "palette per channel": ((24, 6), (1, 6), 4, 1),
    "palette per group": ((24, 6), (3, 6), 4, 1),
    "palette per block of both": ((24, 6), (4, 2), 5, 1),
    "product, shared": ((7, 10), (1, 1), 9, 4),
    "product, per subspace": ((7, 10), (7, 1), 3, 4),
    "rows": ((1, 10), (1, 1), 3, 24),
    "one entry": ((5, 2), (1, 1), 1, 1),
    "many to a sum": ((301, 64), (1, 1), 2, 4),
    "many to a sum, uneven blocks": ((3 * 131, 130), (3, 2), 2, 4),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def draw(case, seed=0):
    (groups, outs), blocks, k, dim = case
    rng = np.random.default_rng(seed)
    tables = rng.normal(size=(*blocks, k, dim)).astype(np.float32)
    codes = rng.integers(0, k, size=(groups, outs))
    upstream = rng.normal(size=(groups, outs, dim)).astype(np.float32)
    return tables, codes, upstream


def places(case, codes):
    """Where in the tables each code points."""
    grid, blocks = case[0], case[1]
    g, out = np.indices(grid)
    return g * blocks[0] // grid[0], out * blocks[1] // grid[1], codes


def sums(case, codes, values):
    (_, blocks, k, dim) = case
    result = np.zeros((*blocks, k, dim))
    np.add.at(result, places(case, codes), values.astype(np.float64))
    return result


@every_case
def test_reads_the_entries(case):
    tables, codes, _ = draw(case)
    got = jax.jit(lookup)(jnp.asarray(tables), jnp.asarray(codes, jnp.uint32))
    np.testing.assert_array_equal(got, tables[places(case, codes)])


@every_case
@pytest.mark.parametrize("method", [sums_by_entry, scattered_sums, product_sums])
def test_sums(case, method):
    _, codes, upstream = draw(case)
    shape = (*case[1], case[2])
    got = jax.jit(functools.partial(method, shape=shape))(jnp.asarray(upstream), jnp.asarray(codes))
    np.testing.assert_allclose(got, sums(case, codes, upstream), rtol=1e-5, atol=1e-4)


@every_case
def test_gradient_is_that_of_indexing(case):
    tables, codes, upstream = draw(case)

    def plain(tables):
        return jnp.vdot(tables[places(case, codes)], upstream)

    def ours(tables):
        return jnp.vdot(lookup(tables, jnp.asarray(codes)), upstream)

    got, expected = jax.jit(jax.grad(ours))(tables), jax.grad(plain)(tables)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [scattered_sums, product_sums])
def test_the_same_bits_every_time(method):
    case = CASES["many to a sum"]
    _, codes, upstream = draw(case)
    run = jax.jit(functools.partial(method, shape=(1, 1, 2)))
    first, second = (np.asarray(run(jnp.asarray(upstream), jnp.asarray(codes))) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint32), second.view(np.uint32))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_do_not_scatter(platform):
    tables, codes, upstream = draw(CASES["palette per channel"])
    step = jax.jit(jax.grad(lambda tables, codes: jnp.vdot(lookup(tables, codes), upstream)))
    program = step.trace(jnp.asarray(tables), jnp.asarray(codes)).lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in program
    assert "scatter" not in program


@pytest.mark.parametrize("method", [scattered_sums, product_sums])
def test_long_sums_of_narrow_floats_keep_their_digits(method):
    # All of one sign, so that a sum in few digits would stop growing.
    values = jnp.abs(jax.random.normal(jax.random.key(1), (256, 256, 1))).astype(jnp.bfloat16)
    expected = np.asarray(values, np.float64).sum()
    run = jax.jit(functools.partial(method, shape=(1, 1, 1)))
    got = run(values.astype(jnp.float32), jnp.zeros((256, 256), jnp.uint8))
    np.testing.assert_allclose(float(got[0, 0, 0, 0]), expected, rtol=3e-7)


def test_one_hot_sums_in_chunks(monkeypatch):
    monkeypatch.setattr("jaxvq.ops.lookup.chunk_length", lambda n, k: 7)
    case = ((20, 3), (2, 3), 4, 2)
    _, codes, upstream = draw(case)
    got = jax.jit(functools.partial(product_sums, shape=(2, 3, 4)))(jnp.asarray(upstream), jnp.asarray(codes))
    np.testing.assert_allclose(got, sums(case, codes, upstream), rtol=1e-5, atol=1e-5)
    flat = one_hot_sums(jnp.asarray(upstream.reshape(-1, 2)), jnp.asarray(codes.reshape(-1)), 4)
    np.testing.assert_allclose(flat, sums(((20, 3), (1, 1), 4, 2), codes, upstream)[0, 0], rtol=1e-5, atol=1e-5)


def loss(tables, codes, upstream):
    return jnp.vdot(lookup(tables, codes), upstream)


def test_stacked_layers_under_vmap_and_scan():
    case = CASES["palette per group"]
    layers = [tuple(map(jnp.asarray, draw(case, seed))) for seed in range(3)]
    tables, codes, upstream = (jnp.stack(parts) for parts in zip(*layers, strict=True))
    expected = np.stack([sums(case, *(np.asarray(part) for part in layer[1:])) for layer in layers])
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(tables, codes, upstream)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)

    def total(tables):
        def add(so_far, layer):
            return so_far + jax.checkpoint(loss)(*layer), None

        return jax.lax.scan(add, 0.0, (tables, codes, upstream))[0]

    np.testing.assert_allclose(jax.jit(jax.grad(total))(tables), expected, rtol=1e-5, atol=1e-5)


def test_codes_wait_for_the_gradient_in_a_byte_each():
    tables, codes, _ = draw(CASES["palette per tensor"])
    _, pull = jax.vjp(lambda tables: lookup(tables, jnp.asarray(codes)), jnp.asarray(tables))
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) == codes.shape]
    assert [str(leaf.dtype) for leaf in kept] == ["uint8"]


def test_codes_have_no_gradient():
    tables, codes, upstream = draw(CASES["palette per tensor"])
    _, pull = jax.vjp(lookup, jnp.asarray(tables), jnp.asarray(codes))
    assert pull(jnp.asarray(upstream))[1].dtype == jax.dtypes.float0


def gradient(array, upstream):
    trainable, frozen = partition(array)
    return jax.jit(jax.grad(lambda t: jnp.vdot(combine(t, frozen).dequantize(), upstream)))(trainable).decoder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_codebooks_get_sums_of_float32(dtype):
    case = ((64, 32), (1, 1), 4, 1)
    tables, codes, upstream = draw(case)
    codebook = Codebook(jnp.asarray(tables[:, :, None], dtype))
    array = QuantizedArray(pack(jnp.asarray(codes)[..., None], 2), codebook, Layout.of((64, 32), "float32"))
    got = gradient(array, jnp.asarray(upstream[..., 0])).vectors
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[:, :, 0], jnp.asarray(sums(case, codes, upstream), jnp.float32).astype(dtype))


def test_scale_of_int8_codebook():
    (groups, outs), (g_blocks, _), k, _ = case = ((24, 6), (3, 1), 4, 1)
    _, codes, upstream = draw(case)
    vectors = np.arange(-6, 6, dtype=np.int8).reshape(g_blocks, 1, 1, k, 1)
    codebook = Codebook(jnp.asarray(vectors), jnp.full((g_blocks, 1, 1, 1, 1), 0.5))
    array = QuantizedArray(pack(jnp.asarray(codes)[..., None], 2), codebook, Layout.of((groups, outs), "float32"))
    got = gradient(array, jnp.asarray(upstream[..., 0]))
    assert got.vectors is None
    expected = (sums(case, codes, upstream) * vectors[:, :, 0]).sum(axis=(2, 3))
    np.testing.assert_allclose(got.scale[:, :, 0, 0, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [(1, 1), (1, 6), (3, 6)])
def test_scale_and_zero_point_of_even_levels(blocks):
    case = ((24, 6), blocks, 16, 1)
    _, codes, upstream = draw(case)
    affine = Affine(jnp.full((*blocks, 1), 0.5), jnp.full((*blocks, 1), 7.25))
    array = QuantizedArray(pack(jnp.asarray(codes)[..., None], 4), affine, Layout.of((24, 6), "float32"))
    got = gradient(array, jnp.asarray(upstream[..., 0]))
    by_code = sums(case, codes, upstream)[..., 0]
    np.testing.assert_allclose(got.scale[..., 0], by_code @ (np.arange(16) - 7.25), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.zero_point[..., 0], -0.5 * by_code.sum(axis=2), rtol=1e-4, atol=1e-4)
