import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_cpu
from jaxvq.ops import tables, tiles

TINY = dataclasses.replace(bench_cpu.SMOKE, inputs=64, outputs=300, repeats=1)


def test_writes_what_it_found_and_a_chart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "VALUES_LEAST", 0)
    monkeypatch.setattr(tiles, "TILE_VALUES", 2**13)
    found = bench_cpu.main(dataclasses.replace(TINY, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "out" / "bench_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["contender"], row["rows"]) for row in found["rows"]] == [
        ("palette4", 1),
        ("residual-2x8", 1),
        ("palette4", 4),
        ("residual-2x8", 4),
    ]
    assert all(0 < row["relative_error"] < 1e-5 for row in found["rows"])
    assert "2 x 8 bits, d=8" in capsys.readouterr().out


def test_both_ways_have_the_same_gradient():
    w = bench_cpu.make_weight("residual-2x8", TINY)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(w)} == {"uint32", "float32"}
    x, cotangent = jnp.arange(64.0)[None] / 64, jnp.arange(300.0)[None] / 300
    runs = bench_cpu.programs(w, x, cotangent)
    ours, plain = runs["matmul_gradient"](), runs["first_gradient"]()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert jnp.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_wrong_product_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_cpu.jaxvq, "matmul", lambda x, w: 2 * (x @ w.dequantize()))
    with pytest.raises(RuntimeError, match="4-bit palettes must be that of the decoded weight within 1e-05, got 1"):
        bench_cpu.main(dataclasses.replace(TINY, out=tmp_path))


def test_no_times_of_other_devices(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(SystemExit):
        bench_cpu.cli(["--smoke"])
    assert "the times are a CPU's, and jax computes on gpu; set JAX_PLATFORMS=cpu" in capsys.readouterr().err
