"""Products that decode a tile at a time, against float64; small weights fall into tiles as tiles are made small."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import jaxvq
from jaxvq.ops import tiles
from jaxvq.ops.matmul import matmul
from jaxvq.ops.tiles import tile_count, tiled_product
from tests.ops.matmul_by_hand import weight_by_hand
from tests.ops.matmul_cases import FORMATS, VECTORS, check_gradients, described, inputs, relative_error, weight

SHAPE = (1024, 96)
exact = functools.partial(matmul, backend="xla", precision="highest")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_VALUES", 2**14)


def expected(x, w):
    return np.asarray(x, np.float64) @ weight_by_hand(w)


def count_of(name, shape, rows=1):
    seen = []
    jax.eval_shape(lambda w: seen.append(tile_count(rows, w)), described(name, shape))
    return seen[0]


def test_how_many_tiles():
    assert count_of("4-bit palettes", (4096, 4096)) == 32
    assert count_of("4-bit palettes", (4096, 4096), rows=16) == 32
    assert count_of("4-bit palettes", (4096, 4096), rows=17) is None
    assert count_of("4-bit palettes", (4096, 4096), rows=0) is None
    assert count_of("4-bit palettes", (512, 512)) is None
    assert count_of("4-bit palettes", (4099, 4096)) is None  # a prime number of inputs
    assert count_of("3-bit palettes", (4096, 4096)) == 32
    assert count_of("3-bit palettes", (4064, 4096)) is None  # 127 times 32 codes, which end where a word ends
    assert count_of("4-bit palettes of groups", (4096, 4096)) == 32
    assert count_of("4-bit palettes of groups", (4096 + 128, 4096)) == 33
    assert count_of("1 x 8 bits, d=2", (4096, 4096)) == 32
    assert count_of("2 x 8 bits, d=8", (4096, 14336)) is None


@pytest.mark.parametrize("name", [name for name in FORMATS if VECTORS.get(name, (0, 0, 1))[2] == 1])
def test_products(name, small_tiles):
    w, x = weight(name, SHAPE), inputs(3, SHAPE[0], "float32")
    count = tile_count(3, w)
    assert count is not None
    assert relative_error(tiled_product(x, w, count=count, precision="highest"), expected(x, w)) < 1e-6
    assert relative_error(exact(x, w), expected(x, w)) < 1e-6


def test_products_in_half_precision_add_up_in_float32(small_tiles):
    w, x = weight("4-bit palettes", SHAPE), inputs(2, SHAPE[0], "bfloat16")
    got = matmul(x, w, backend="xla")
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, expected(x, w)) < 4e-3
    half = weight("4-bit palettes", SHAPE)
    assert matmul(x.astype("float16"), half, backend="xla").dtype == jnp.float16


@pytest.mark.parametrize("name", ["4-bit palettes", "4-bit palettes of groups", "1 x 5 bits, d=4", "4 bits, groups"])
def test_gradients(name, small_tiles):
    check_gradients(exact, weight(name, SHAPE), inputs(3, SHAPE[0], "float32"))


def test_other_derivatives_and_maps(small_tiles):
    w, x = weight("3-bit palettes", SHAPE), inputs(2, SHAPE[0], "float32")
    value, tangent = jax.jvp(lambda x: exact(x, w), (x,), (2 * x,))
    np.testing.assert_allclose(tangent, 2 * value, rtol=1e-5, atol=1e-3)
    squares = jax.hessian(lambda x: jnp.sum(exact(x, w) ** 2) / 2)(x[0])
    assert relative_error(squares, weight_by_hand(w) @ weight_by_hand(w).T) < 1e-5
    np.testing.assert_allclose(jax.vmap(lambda x: exact(x, w))(x), value, rtol=1e-5, atol=1e-3)
    batch = exact(x.reshape(2, 1, -1), w)
    assert batch.shape == (2, 1, SHAPE[1])
    np.testing.assert_allclose(batch[:, 0], value, rtol=1e-5, atol=1e-3)


def test_products_of_no_rows(small_tiles):
    assert exact(inputs(0, SHAPE[0], "float32"), weight("4-bit palettes", SHAPE)).shape == (0, SHAPE[1])


def test_a_transposed_weight(small_tiles):
    table = jax.random.normal(jax.random.key(0), (96, 1024))
    spec = jaxvq.Spec(default=jaxvq.KMeans(bits=4, per="channel"), out_axis=0)
    w = jaxvq.quantize_params({"table": table}, spec, key=jax.random.key(1))["table"]
    x = inputs(1, 1024, "float32")
    assert tile_count(1, w) is not None
    got = matmul(x, w, transpose=True, precision="highest")
    assert relative_error(got, np.asarray(x, "d") @ np.asarray(w.dequantize(), "d").T) < 1e-6
    other = matmul(inputs(1, 96, "float32"), w, precision="highest")  # along the outputs of the table
    assert relative_error(other, np.asarray(inputs(1, 96, "float32"), "d") @ np.asarray(w.dequantize(), "d")) < 1e-6


def test_only_a_cpu_takes_tiles(small_tiles):
    def text(platform):
        w, x = weight("4-bit palettes", SHAPE), inputs(1, SHAPE[0], "float32")
        return jax.export.export(jax.jit(exact), platforms=[platform])(x, w).mlir_module()

    assert "stablehlo.while" in text("cpu")
    assert "stablehlo.while" not in text("tpu")
    assert "stablehlo.while" not in text("cuda")


def test_on_several_devices(small_tiles):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    w, x = weight("4-bit palettes", SHAPE), inputs(2, SHAPE[0], "float32")
    outs = jax.P(None, "model")
    parts = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, outs)), w)
    product = jax.jit(exact)(x, parts)
    assert product.sharding.spec == outs
    assert relative_error(product, expected(x, w)) < 1e-6

    rows = jax.shard_map(exact, mesh=mesh, in_specs=(jax.P("model"), jax.P()), out_specs=jax.P("model"))
    assert relative_error(jax.jit(rows)(x, w), expected(x, w)) < 1e-6


def test_one_program_for_all_platforms(small_tiles):
    w, x = weight("4-bit palettes", SHAPE), inputs(1, SHAPE[0], "float32")
    exported = jax.export.export(jax.jit(jax.grad(lambda x: exact(x, w).sum())), platforms=("cuda", "tpu", "cpu"))(x)
    assert relative_error(exported.call(x), weight_by_hand(w).sum(axis=1)[None]) < 1e-5
