"""The kernels of products against float64: `pytest -m gpu`, on an NVIDIA GPU or, without one, interpreted."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.array import combine, partition
from jaxvq.bits import unpack
from jaxvq.ops import cuda, fused, schedule
from jaxvq.ops.matmul import matmul
from jaxvq.ops.problem import Problem
from tests.ops.matmul_cases import FORMATS, PALETTES, ROWS, SHAPES, VECTORS, inputs, relative_error, weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.compiler() is None, reason="NVRTC is not installed"),
]
MOST = {"bfloat16": 4e-3, "float16": 1e-3}


def expected(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)


def digits_lost(got, x, w):
    """The error next to the size of the sums, which are rounded, or the usual size of such, of which they are made."""
    exact = expected(x, w)
    squares = np.asarray(x, np.float64) ** 2 @ np.asarray(w.dequantize(), np.float64) ** 2
    size = max(np.linalg.norm(exact), np.sqrt(squares.sum()))
    return np.linalg.norm(np.asarray(got, np.float64) - exact) / size


def poison():
    """Leaves NaN in memory that is free again, so that what a kernel forgets to write shows."""
    if jax.default_backend() == "gpu":
        jax.block_until_ready(jnp.full((64, 1024, 1024), jnp.nan))


def traced_anew(x, w):
    """`matmul` remembers what it traced for a shape, whatever has been changed since."""
    poison()
    return jax.jit(lambda x, w: fused.product(x, w))(x, w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_products_have_the_digits_of_their_dtype(name, shape):
    w = weight(name, shape)
    served = fused.reason(1, shape[0], jnp.bfloat16, w) is None
    assert served or shape == (32, 8), fused.reason(1, shape[0], jnp.bfloat16, w)
    for rows in ROWS if served else []:
        for dtype in MOST if rows < 16 else ["bfloat16"]:
            x = inputs(rows, shape[0], dtype)
            poison()
            got = jax.jit(functools.partial(matmul, backend="cuda"))(x, w)
            assert got.dtype == x.dtype
            assert digits_lost(got, x, w) < MOST[dtype], (rows, dtype)


@pytest.mark.parametrize("shape", [(4352, 196), (1008, 301)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_more_outputs_than_a_processor_has_at_once(name, shape, monkeypatch):
    """As if there were one processor, which takes turns like those of a large GPU with large weights."""
    monkeypatch.setattr(schedule, "PROCESSORS", 1)
    monkeypatch.setattr(schedule, "CLUSTERS", {1: 1})
    w = weight(name, shape)
    for rows in (1, 2, 4, 16, 20) if fused.reason(1, shape[0], jnp.bfloat16, w) is None else ():
        x = inputs(rows, shape[0], "bfloat16")
        assert digits_lost(traced_anew(x, w), x, w) < 4e-3, rows


@pytest.mark.parametrize("processors", [1, 8])
@pytest.mark.parametrize("shape", [(2048, 204), (1003, 150), (4096, 380), (3000, 377), (257, 100), (8200, 99)], ids=str)
@pytest.mark.parametrize("name", [name for name in PALETTES if "groups" not in name])
def test_codes_of_palettes_come_by_rings(name, shape, processors, monkeypatch):
    """Whole steps of the input side and parts of one, x in registers and in shared memory, several tables in turn.

    With more processors, lanes of a warp share the outputs.
    """
    monkeypatch.setattr(schedule, "PROCESSORS", processors)
    monkeypatch.setattr(schedule, "CLUSTERS", {1: processors})
    w = weight(name, shape)
    for rows in (1, 2):
        x = inputs(rows, shape[0], "bfloat16")
        tiles = schedule.choose(Problem(rows, shape[0], x.dtype, w))
        assert (tiles.kernel, tiles.lanes < 32) == ("pairs", shape[1] <= processors * 32)
        assert digits_lost(traced_anew(x, w), x, w) < 4e-3


TABLES = ["2 x 8 bits, d=8", "1 x 12 bits, d=8", "3 x 6 bits, d=4, int8", "4 x 4 bits, d=8", "1 x 5 bits, d=4"]
TABLES += ["1 x 7 bits, d=4, 100 entries", "1 x 11 bits, d=8", "3 x 9 bits, d=8", "4 x 8 bits, d=4"]


@pytest.fixture
def tables(monkeypatch):
    """As if tables of inner products were ready at once, so that small weights have them too."""
    monkeypatch.setattr(schedule, "STARTING", -math.inf)


def by_table(x, w):
    assert schedule.choose(Problem(x.shape[0], x.shape[1], x.dtype, w)).kernel == "products"
    return traced_anew(x, w)


@pytest.mark.parametrize("shape", [*SHAPES[:-1], (4096, 1024), (4352, 196), (1003, 301)], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_inner_products(name, shape, tables, monkeypatch):
    w = weight(name, shape)
    for dtype, most in MOST.items():
        x = inputs(1, shape[0], dtype)
        assert digits_lost(by_table(x, w), x, w) < most, dtype
    monkeypatch.setattr(schedule, "CLUSTERS", {1: 1, 2: 1, 4: 1, 8: 1})  # takes turns like those of large weights
    assert digits_lost(by_table(x, w), x, w) < most
    monkeypatch.setattr(cuda, "has_clusters", lambda: False)
    assert digits_lost(by_table(x, w), x, w) < most


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e20, 1e35])
@pytest.mark.parametrize("name", TABLES[:2])
def test_tables_of_very_small_and_large_inner_products(name, scale, tables):
    w, x = weight(name, (1024, 96)), (inputs(1, 1024, "float32") * scale).astype(jnp.bfloat16)
    got, plain = np.asarray(by_table(x, w), np.float64), expected(x, w)
    assert np.abs(got - plain).max() <= 4e-3 * np.abs(plain).max() + 1e-37


def test_a_large_vector_that_nothing_uses_costs_few_digits(tables):
    w, x = weight("1 x 12 bits, d=8", (1024, 96)), inputs(1, 1024, "bfloat16")
    unused = min(set(range(4096)) - set(np.asarray(unpack(w.codes)).ravel().tolist()))
    large = jax.tree.map(lambda leaf: leaf.at[0, 0, 0, unused].mul(1e5) if leaf.ndim == 5 else leaf, w)
    assert digits_lost(by_table(x, large), x, w) < 4e-3


@pytest.mark.parametrize("name", TABLES[:2])
def test_what_is_not_finite_shows_in_tables_where_it_is_used(name, tables):
    w, x = weight(name, (1000, 77)), inputs(1, 1000, "bfloat16")
    assert not np.isfinite(np.asarray(by_table(x.at[0, 3].set(jnp.nan), w), "f")).any()
    used = np.asarray((unpack(w.codes) == 5)[..., 0].any(axis=0))
    for value in (jnp.nan, jnp.inf):
        spoilt = jax.tree.map(lambda leaf, value=value: leaf.at[..., 0, 5, 2].set(value) if leaf.ndim == 5 else leaf, w)
        np.testing.assert_array_equal(np.isfinite(np.asarray(by_table(x, spoilt), "f"))[0], ~used)


@pytest.mark.parametrize("shape", [(1000, 77), (4099, 77)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_written_out_as_it_is_decoded(name, shape):
    w = weight(name, shape)
    poison()
    got = jax.jit(lambda w: fused.expand(w, jnp.float16))(w)
    assert relative_error(got.T, w.dequantize()) < 1e-3


@pytest.mark.parametrize("name", [next(iter(PALETTES)), next(iter(VECTORS)), "4 bits, groups"])
@pytest.mark.parametrize("rows", [1, 20])
def test_gradients_are_those_of_the_plain_program(name, rows):
    w, x = weight(name, (512, 96)), inputs(rows, 512, "bfloat16")
    trainable, frozen = partition(w)

    def loss(x, trainable, backend):
        return jnp.sum(matmul(x, combine(trainable, frozen), backend=backend).astype(jnp.float32) ** 2)

    by_kernel, plain = (jax.grad(loss, argnums=(0, 1))(x, trainable, way) for way in ("cuda", "xla"))
    for ours, theirs in zip(jax.tree.leaves(by_kernel), jax.tree.leaves(plain), strict=True):
        assert relative_error(ours, theirs) < 2e-2


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no NVIDIA GPU")
def test_the_kernel_is_what_runs_and_once():
    w, x = weight("4-bit palettes", (1024, 96)), inputs(1, 1024, "bfloat16")
    text = jax.jit(matmul).lower(x, w).compile().as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.ptx"') == 1
    assert "gather" not in text


LEVELS_TOO = ["4-bit palettes", "4 bits", "4 bits, groups"]  # for these, x has all its digits from 1e-32 on


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("name", LEVELS_TOO)
def test_inputs_that_are_not_finite_show(name, rows):
    w, x = weight(name, (1024, 96)), inputs(rows, 1024, "bfloat16")
    for value in (jnp.nan, jnp.inf):
        finite = np.isfinite(np.asarray(matmul(x.at[0, 3].set(value), w), "f"))
        assert not finite[0].any()
        assert finite[1:].all()


def test_entries_that_are_not_finite_show_where_they_are_used():
    w, x = weight("4-bit palettes", (1024, 96)), inputs(1, 1024, "bfloat16")
    spoilt = jax.tree.map(lambda leaf: leaf.at[0, 5, 0, 3, 0].set(jnp.nan) if leaf.ndim == 5 else leaf, w)
    columns = np.isfinite(np.asarray(matmul(x, spoilt), "f"))[0]
    assert not columns[5]
    assert columns.sum() == 95


def test_entries_that_nothing_uses_do_not_matter():
    w, x = weight("13 entries", (1024, 96)), inputs(1, 1024, "bfloat16")
    spoilt = jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, 0)] * 3 + [(0, 3), (0, 0)], constant_values=jnp.inf), w.decoder
    )
    np.testing.assert_array_equal(matmul(x, dataclasses.replace(w, decoder=spoilt)), matmul(x, w))


def test_sums_that_only_grow():
    w, x = weight("4-bit palettes", (1024, 96)), jnp.ones((1, 1024), "float16")
    same = np.linspace(0.5, 1, 96, dtype="f")[None, :, None, None, None] / 1024
    w = jax.tree.map(lambda leaf: jnp.broadcast_to(same, leaf.shape) if leaf.ndim == 5 else leaf, w)
    assert relative_error(matmul(x, w), expected(x, w)) < 2e-3


@pytest.mark.parametrize(
    ("name", "scale"),
    [("4-bit palettes", 1e-38), *((name, scale) for name in LEVELS_TOO for scale in (0.0, 1e-31, 1e-20, 1e20, 1e35))],
)
def test_rows_of_very_different_sizes(name, scale):
    w = weight(name, (1024, 96))
    for rows in (2, 3):  # served by two kernels
        sizes = jnp.array([1.0] * (rows - 1) + [scale], jnp.float32)
        x = (inputs(rows, 1024, "float32") * sizes[:, None]).astype(jnp.bfloat16)
        got, plain = np.asarray(matmul(x, w), np.float64), expected(x, w)
        assert relative_error(got[:-1], plain[:-1]) < 4e-3
        assert np.abs(got[-1] - plain[-1]).max() <= 4e-3 * np.abs(plain[-1]).max() + 1e-37


@pytest.mark.parametrize("zero_point", [-1e6, 300.0])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_levels_far_from_zero(bits, rows, zero_point):
    w, x = weight(f"{bits} bits", (1024, 96)), inputs(rows, 1024, "bfloat16")
    w = dataclasses.replace(w, decoder=dataclasses.replace(w.decoder, zero_point=jnp.full((1, 96, 1), zero_point)))
    assert digits_lost(matmul(x, w), x, w) < 4e-3


@pytest.mark.parametrize("name", ["4-bit palettes", "3-bit palettes"])
def test_palettes_of_very_different_sizes(name):
    w, x = weight(name, (1024, 96)), inputs(2, 1024, "bfloat16")
    sizes = np.logspace(-18, 18, 96).astype(np.float32)[None, :, None, None, None]
    w = jax.tree.map(lambda leaf: leaf * sizes if leaf.ndim == 5 else leaf, w)
    got, plain = np.asarray(matmul(x, w), np.float64), expected(x, w)
    for column in range(96):
        assert relative_error(got[:, column], plain[:, column]) < 2e-2, column  # two sums may happen to be small


def test_products_run_inside_loops_and_maps():
    w, xs = weight("3-bit palettes", (1024, 96)), inputs(5, 1024, "bfloat16")
    together = np.asarray(matmul(xs, w), "f")
    mapped = np.asarray(jax.lax.map(lambda x: matmul(x, w), xs), "f")
    np.testing.assert_allclose(mapped, together, rtol=2e-2, atol=0.5)
    np.testing.assert_array_equal(jax.vmap(lambda x: matmul(x, w))(xs), matmul(xs, w))
