"""Products by tables of inner products, against float64; small weights have them as none is too small."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.ops import tables
from jaxvq.ops.matmul import matmul
from jaxvq.ops.tables import has_tables, table_product
from tests.ops.matmul_by_hand import weight_by_hand
from tests.ops.matmul_cases import VECTORS, check_gradients, described, inputs, relative_error, weight

exact = functools.partial(matmul, backend="xla", precision="highest")


@pytest.fixture
def no_weight_too_small(monkeypatch):
    monkeypatch.setattr(tables, "VALUES_LEAST", 0)


def takes(name, shape, rows):
    seen = []
    jax.eval_shape(lambda w: seen.append(has_tables(rows, w)), described(name, shape))
    return seen[0]


@pytest.mark.parametrize(
    ("name", "shape", "rows", "wanted"),
    [
        ("2 x 8 bits, d=8", (4096, 4096), 1, True),
        ("2 x 8 bits, d=8", (4096, 4096), 8, True),
        ("2 x 8 bits, d=8", (4096, 4096), 9, False),
        ("2 x 8 bits, d=8", (4096, 4096), 0, False),
        ("2 x 8 bits, d=8", (512, 512), 1, False),  # small
        ("3 x 6 bits, d=4, int8", (4096, 4096), 4, True),
        ("1 x 12 bits, d=8", (4096, 4096), 1, True),
        ("1 x 12 bits, d=8", (4096, 4096), 2, False),
        ("1 x 12 bits, d=8", (8192, 4095), 1, False),  # more entries than outputs
        ("4-bit palette of the tensor", (4096, 4096), 1, False),
        ("4-bit palettes", (4096, 4096), 1, False),
        ("4 bits", (4096, 4096), 1, False),
    ],
)
def test_what_has_tables(name, shape, rows, wanted):
    assert takes(name, shape, rows) == wanted


def test_codebooks_of_parts_of_the_weight_have_none(no_weight_too_small):
    w = weight("2 x 8 bits, d=8", (512, 300))
    assert has_tables(1, w)
    for part in ({"vectors": jnp.tile(w.decoder.vectors, (2, 1, 1, 1, 1))}, {"scale": jnp.ones((1, 300, 1, 1, 1))}):
        assert not has_tables(1, dataclasses.replace(w, decoder=dataclasses.replace(w.decoder, **part)))


@pytest.mark.parametrize("shape", [(1024, 96), (1000, 77), (8, 3)], ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_products(name, shape):
    w = weight(name, shape)
    for rows in (1, 3):
        x = inputs(rows, shape[0], "float32")
        got = table_product(x, w, precision="highest")
        assert got.dtype == jnp.float32
        assert relative_error(got, np.asarray(x, "d") @ weight_by_hand(w)) < 1e-6


def test_products_in_half_precision_add_up_in_float32(no_weight_too_small):
    w, x = weight("2 x 8 bits, d=8", (1024, 300)), inputs(1, 1024, "bfloat16")
    got = matmul(x, w, backend="xla")
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, np.asarray(x, "d") @ weight_by_hand(w)) < 4e-3


@pytest.mark.parametrize("name", ["2 x 8 bits, d=8", "3 x 6 bits, d=4, int8", "1 x 5 bits, d=4"])
def test_gradients(name, no_weight_too_small):
    w, x = weight(name, (1000, 300)), inputs(1, 1000, "float32")
    assert has_tables(1, w)
    check_gradients(exact, w, x)


def test_other_derivatives_and_maps(no_weight_too_small):
    w, x = weight("2 x 8 bits, d=8", (256, 300)), inputs(1, 256, "float32")
    value, tangent = jax.jvp(lambda x: exact(x, w), (x,), (2 * x,))
    np.testing.assert_allclose(tangent, 2 * value, rtol=1e-5, atol=1e-3)
    squares = jax.hessian(lambda x: jnp.sum(exact(x, w) ** 2) / 2)(x[0])
    assert relative_error(squares, weight_by_hand(w) @ weight_by_hand(w).T) < 1e-5
    several = inputs(3, 256, "float32")
    mapped = jax.vmap(lambda x: exact(x, w))(several)
    assert relative_error(mapped, np.asarray(several, "d") @ weight_by_hand(w)) < 1e-6


def test_only_a_cpu_has_tables(no_weight_too_small):
    def text(platform):
        w, x = weight("2 x 8 bits, d=8", (1024, 300)), inputs(1, 1024, "float32")
        return jax.export.export(jax.jit(exact), platforms=[platform])(x, w).mlir_module()

    assert "stablehlo.while" in text("cpu")
    assert "stablehlo.while" not in text("tpu")
    assert "stablehlo.while" not in text("cuda")
