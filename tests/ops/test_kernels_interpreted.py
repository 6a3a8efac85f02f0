"""The kernels of products on the CPU, instruction by instruction. All of `tests/gpu` runs that way with `-m gpu`."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.ops import cuda, fused, schedule
from jaxvq.ops.problem import Problem
from tests.ops import interpreted
from tests.ops.matmul_cases import FORMATS, inputs, relative_error, weight

pytestmark = pytest.mark.skipif(cuda.compiler() is None, reason="NVRTC is not installed")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    interpreted.interpret(monkeypatch)
    yield
    interpreted.forget()


def exact(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_every_format(name):
    w = weight(name, (1000, 77))
    for rows in (1, 2, 16):
        x = inputs(rows, 1000, "bfloat16")
        assert relative_error(fused.product(x, w), exact(x, w)) < 4e-3, rows


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_every_format_are_written_out(name):
    w = weight(name, (1000, 77))
    assert relative_error(fused.expand(w, jnp.float16).T, w.dequantize()) < 1e-3


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("name", ["2 x 8 bits, d=8", "1 x 12 bits, d=8", "1 x 11 bits, d=8"])
def test_tables_of_inner_products(name, clusters, monkeypatch):
    """As if they were ready at once, so that small weights have them too."""
    monkeypatch.setattr(schedule, "STARTING", -math.inf)
    monkeypatch.setattr(cuda, "has_clusters", lambda: clusters)
    w, x = weight(name, (4000, 77)), inputs(1, 4000, "bfloat16")
    tiles = schedule.choose(Problem(1, 4000, x.dtype, w))
    assert tiles is not None
    assert (tiles.kernel, tiles.k_blocks > 1) == ("products", clusters)
    assert relative_error(fused.product(x, w), exact(x, w)) < 4e-3


@pytest.mark.parametrize("processors", [1, 8])
@pytest.mark.parametrize("name", ["4-bit palettes", "3-bit palettes", "2-bit palettes", "4 bits", "4 bits, groups"])
def test_processors_that_take_turns(name, processors, monkeypatch):
    """As if there were few, with rings that codes come by, and lanes that share outputs."""
    monkeypatch.setattr(schedule, "PROCESSORS", processors)
    monkeypatch.setattr(schedule, "CLUSTERS", {1: processors})
    w = weight(name, (2048, 204))
    for rows in (1, 2):
        x = inputs(rows, 2048, "bfloat16")
        assert relative_error(fused.product(x, w), exact(x, w)) < 4e-3, rows


@pytest.mark.parametrize("name", ["4-bit palettes", "4 bits", "4 bits, groups", "2 x 8 bits, d=8", "1 x 12 bits, d=8"])
@pytest.mark.parametrize("order", [1, -1])
def test_warps_that_go_as_far_as_they_come(order, name, monkeypatch):
    """Where a barrier is missing, a warp reads what another has not written yet."""
    interpreted.interpret(monkeypatch, order)
    w = weight(name, (1000, 77))
    for rows in (1, 2, 16):
        x = inputs(rows, 1000, "bfloat16")
        assert relative_error(fused.product(x, w), exact(x, w)) < 4e-3, rows
    assert relative_error(fused.expand(w, jnp.float16).T, w.dequantize()) < 1e-3
    if "d=8" in name:
        monkeypatch.setattr(schedule, "STARTING", -math.inf)
        x = inputs(1, 1000, "bfloat16")
        assert relative_error(fused.product(x, w), exact(x, w)) < 4e-3
