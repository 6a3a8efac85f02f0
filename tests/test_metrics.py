import csv
import inspect
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import packed

import jaxvq
from jaxvq import metrics, storage
from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.layout import Layout


def palette(codes, vectors, *, bits, scale=None, **kwargs):
    """A QuantizedArray [in, out] of codes [g, out, m]."""
    codes, vectors = np.asarray(codes), jnp.asarray(vectors)
    shape = (codes.shape[0] * vectors.shape[-1], codes.shape[1])
    layout = Layout.of(shape, "float32", dim=vectors.shape[-1], **kwargs)
    return QuantizedArray(packed(codes, bits), Codebook(vectors, scale), layout)


def test_figures_of_one_leaf():
    codes = np.array([[[0], [1]], [[2], [3]], [[1], [1]]])  # 3 x 2
    array = palette(codes, jnp.arange(4.0).reshape(1, 1, 1, 4, 1), bits=2)
    weight = jnp.array([[0.0, 1.0], [2.0, 3.5], [1.0, 1.0]])
    leaf = metrics.report({"w": weight}, {"w": array}).leaves[0]
    assert (leaf.path, leaf.shape, leaf.dtype) == ("w", (3, 2), "float32")
    assert (leaf.codes_nbytes, leaf.codebook_nbytes, leaf.scales_nbytes, leaf.float_nbytes) == (8, 16, 0, 0)
    assert leaf.nbytes == array.nbytes == 24
    assert leaf.bits_per_weight == array.bits_per_weight == 32
    assert leaf.original_nbytes == 24
    assert leaf.ratio == 1
    assert leaf.sqnr_db == pytest.approx(10 * math.log10((1 + 4 + 3.5**2 + 2) / 0.25))
    assert leaf.note == "codebook larger than its codes"
    assert leaf.method == "codebook 4x1"


def test_scales_are_counted_apart():
    layout = Layout.of((64, 2), "bfloat16")
    codes = packed(np.zeros((64, 2, 1), int), 4)
    array = QuantizedArray(codes, Affine(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1))), layout)
    leaf = metrics.report(None, {"w": array}).leaves[0]
    assert (leaf.codes_nbytes, leaf.codebook_nbytes, leaf.scales_nbytes) == (64, 0, 16)
    assert leaf.method == "affine, 4 bits"
    assert leaf.ratio == 256 / 80
    assert leaf.sqnr_db is None


def test_centroids_without_a_weight():
    codes = np.array([[[0], [1]], [[2], [1]]])
    vectors = jnp.arange(8.0).reshape(1, 1, 1, 8, 1)
    assert "3 of 8 centroids used" in metrics.report(None, [palette(codes, vectors, bits=3)]).leaves[0].note
    each = jnp.arange(16.0).reshape(1, 2, 1, 8, 1)  # one table for each output
    assert "as few as 1 of 8 centroids used" in metrics.report(None, [palette(codes, each, bits=3)]).leaves[0].note
    full = palette(codes, jnp.arange(3.0).reshape(1, 1, 1, 3, 1), bits=2)
    assert "used" not in metrics.report(None, [full]).leaves[0].note


def test_used_centroids_match_brute_force(monkeypatch):
    monkeypatch.setattr("jaxvq._hostcodes.PIECE", 32)  # many pieces
    rng = np.random.default_rng(0)
    for axis in (0, 1):
        shape = (150, 4) if axis == 0 else (6, 100)
        codes = rng.integers(0, 32, (*shape, 2))
        vectors = jnp.ones((3, 2, 2, 32, 1))
        array = QuantizedArray(packed(codes, 5, axis), Codebook(vectors), Layout.of(shape, "float32"))
        tables = codes.reshape(3, shape[0] // 3, 2, shape[1] // 2, 2).transpose(0, 2, 4, 1, 3).reshape(12, -1)
        least = min(len(set(table)) for table in tables.tolist())
        assert metrics.unused_note(array) == [f"as few as {least} of 32 centroids used"]


def test_totals_are_the_file_but_for_its_header(tmp_path):
    codes = np.arange(20).reshape(5, 4, 1) % 4
    tree = {
        "a": palette(codes, jnp.arange(4.0).reshape(1, 1, 1, 4, 1), bits=2),
        "b": [palette(codes, jnp.ones((1, 1, 1, 4, 2), jnp.int8), bits=3, scale=jnp.ones((1, 1, 1, 1, 1)))],
        "c": jnp.ones((3,), jnp.bfloat16),
        "d": None,
        "e": np.ones(2),
    }
    report = metrics.report(None, tree)
    storage.save(tmp_path / "x", tree)
    with storage.CheckpointReader(tmp_path / "x") as reader:
        assert report.nbytes == reader.file_nbytes - reader.header_nbytes
    assert report.checksums_nbytes == 4 * 8
    assert report.original_nbytes == 20 * 4 + 40 * 4 + 6 + 16


def test_exact_zero_and_total_sqnr():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0, 2.0]), "z": jnp.zeros(2)}
    near = {"a": jnp.array([3.0, 4.5]), "b": params["b"], "z": jnp.ones(2)}
    report = metrics.report(params, near)
    assert [leaf.sqnr_db for leaf in report.leaves] == [pytest.approx(20), math.inf, -math.inf]
    assert report.sqnr_db == pytest.approx(10 * math.log10(30 / 2.25))
    leaves = report.to_json()["leaves"]
    assert [(leaf["sqnr_db"], leaf["exact"]) for leaf in leaves] == [
        (pytest.approx(20), False),
        (None, True),
        (None, False),
    ]


def test_sqnr_is_safe_from_overflow_and_loss():
    big = metrics.report([jnp.full(3, 1e30)], [jnp.full(3, 0.99e30)])
    assert big.sqnr_db == pytest.approx(40, abs=1e-3)
    many = jnp.ones(3_000_000, jnp.bfloat16)
    assert metrics.report([many], [many * 1.0078125]).sqnr_db == pytest.approx(20 * math.log10(128))


def test_table_json_and_csv_agree():
    codes = np.arange(24).reshape(6, 4, 1) % 4
    tree = {"net": {"w": palette(codes, jnp.arange(4.0).reshape(1, 1, 1, 4, 1), bits=2), "[b]": jnp.ones(5)}}
    report = metrics.report(
        jax.tree.map(lambda a: a, {"net": {"w": tree["net"]["w"].dequantize(), "[b]": jnp.ones(5)}}), tree
    )
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [leaf["path"] for leaf in content["leaves"]] == ["net/[b]", "net/w"]
    assert [row["path"] for row in rows] == ["net/[b]", "net/w", "#crc32", "total"]
    assert sum(int(row["nbytes"]) for row in rows[:-1]) == int(rows[-1]["nbytes"]) == report.nbytes
    total = sum(leaf["nbytes"] for leaf in content["leaves"]) + content["checksums_nbytes"]
    assert total == content["total"]["nbytes"] == report.nbytes
    text = str(report)
    assert "net/[b]" in text
    assert "exact" in text
    assert f"{report.nbytes:,}" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_plan_gives_methods_and_reasons():
    params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    plan = jaxvq.resolve(params, jaxvq.KMeans(bits=2, per="channel"))
    quantized = jaxvq.quantize_params(params, jaxvq.KMeans(bits=2, per="channel"), key=jax.random.key(0))
    leaves = {leaf.path: leaf for leaf in metrics.report(params, quantized, plan=plan).leaves}
    assert leaves["w"].method == "KMeans(bits=2, per='channel')"
    assert leaves["b"].method == "float"
    assert leaves["b"].note


def test_shapes_only():
    codes = np.zeros((6, 4, 1), int)
    tree = {"w": palette(codes, jnp.arange(4.0).reshape(1, 1, 1, 4, 1), bits=2), "b": jnp.ones(3)}
    structs = jax.eval_shape(lambda: tree)
    assert metrics.report(None, structs).nbytes == metrics.report(None, tree).nbytes


def test_trees_that_differ():
    with pytest.raises(ValueError, match=r"b: `original_params` and `quantized_params` must have the same leaves"):
        metrics.report({"a": jnp.ones(1)}, {"a": jnp.ones(1), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"a: .* must have the same shapes, got \(2,\) and \(1,\)"):
        metrics.report({"a": jnp.ones(2)}, {"a": jnp.ones(1)})


def test_notes_from_the_leaf_itself():
    tree = {"b": jnp.ones(3), "n": np.ones((2, 2), np.int32), "w": jnp.ones((2, 2))}
    notes = [leaf.note for leaf in metrics.report(tree, tree).leaves]
    assert notes == ["rank 1, not a weight matrix", "int32 is not a float dtype", "kept float"]


def test_arguments_of_the_wrong_kind():
    unchecked_report = inspect.unwrap(metrics.report)  # as users have it: without the type checker of the tests
    array = palette(np.zeros((2, 1, 1), int), jnp.ones((1, 1, 1, 2, 1)), bits=1)
    plain = {"w": array.dequantize()}
    for second in (plain, {"w": array}):
        with pytest.raises(TypeError, match="w: `original_params` must hold plain arrays, got a QuantizedArray"):
            metrics.report({"w": array}, second)
    with pytest.raises(TypeError, match=r"`plan` must be a Plan, got KMeans\(.*; pass jaxvq.resolve"):
        unchecked_report(plain, {"w": array}, plan=jaxvq.KMeans(bits=1))
    with pytest.raises(TypeError, match="a: a leaf must hold numbers, got dtype key"):
        metrics.report(None, {"a": jax.random.key(0)})
    with pytest.raises(TypeError, match="a: a leaf must be an array, got builtin_function_or_method"):
        metrics.report(None, {"a": len})


def test_an_empty_tree():
    report = metrics.report({}, {})
    assert (report.ratio, report.nbytes) == (1, 4)
    assert "0.00x" not in str(report)
    assert metrics.report(None, [jnp.ones((0, 3))]).leaves[0].ratio == 1
