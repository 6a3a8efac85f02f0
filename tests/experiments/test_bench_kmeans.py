import dataclasses
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_kmeans, clustering_charts, clustering_cold, clustering_contenders, clustering_race
from experiments.bench_kmeans import Case, Config
from experiments.clustering_race import Chip, Contender, Problem, Target

POINTS = np.random.default_rng(0).normal(size=(1, 60, 2)).astype("f")


def contender(name, *, offset=0.0, seconds=(0.0, 0.0), clock=None, runs=3, **settings):
    """One that returns the first three points, moved by `offset`, and takes so long per call and per iteration."""

    def fit(seed, iterations):
        if clock is not None:
            clock[0] += seconds[0] + iterations * seconds[1]
        return POINTS[:, :3] + np.float32(offset)

    return Contender(name, lambda: fit, runs, **settings)


def problem(*contenders, **settings):
    first = contenders[0].name
    return Problem("a problem", jnp.asarray(POINTS), 3, 11, contenders, rival=first, exact=first, **settings)


def race(of):
    return clustering_race.race(of, seed=0, track=lambda turns, text: turns)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clustering_race.time, "perf_counter", lambda: now[0])
    return now


def test_an_iteration_is_what_many_take_more_than_one(clock):
    rival = contender("rival", seconds=(5.0, 2.0), clock=clock)
    ours = contender("jaxvq", seconds=(7.0, 0.5), clock=clock, judged=True)
    targets = (Target("time_ratio", 0.2), Target("time_ratio", 0.25))
    limits = {"bytes": 0.1, "argmin": 0.25}
    rows = race(problem(rival, ours, times_one=True, compares="iteration_seconds", limits=limits, targets=targets))
    assert [row["iteration_seconds"] for row in rows] == pytest.approx([2.0, 0.5])
    assert [row["seconds"] for row in rows] == pytest.approx([5 + 22, 7 + 5.5])
    assert [row["time_ratio"] for row in rows] == pytest.approx([1, 0.25])
    assert [target["met"] for target in rows[1]["targets"]] == [False, True]
    assert (rows[1]["limited_by"], rows[1]["times_limit"]) == ("argmin", pytest.approx(2))
    assert "targets" not in rows[0]


def test_errors_are_ratios_to_the_exact_one_which_need_not_be_timed():
    exact = contender("exact", runs=0)
    rows = race(
        problem(exact, contender("jaxvq", offset=9.0, judged=True), targets=(Target("distortion_ratio", 1.001),))
    )
    x, near, far = POINTS[0], POINTS[0, :3], POINTS[0, :3] + np.float32(9)
    expected = [((x[:, None] - c) ** 2).sum(-1).min(1).mean() / 2 for c in (near, far)]
    assert [row["distortion"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert rows[1]["distortion_ratio"] == pytest.approx(expected[1] / expected[0], rel=1e-5)
    assert rows[0]["seconds"] is None
    assert rows[1]["time_ratio"] is None
    assert not rows[1]["targets"][0]["met"]


def test_one_that_fails_says_so_and_the_others_go_on():
    def prepare():
        raise RuntimeError("no room on the device\nand more")

    rows = race(
        problem(Contender("rival", prepare, 3), contender("jaxvq", judged=True), targets=(Target("time_ratio", 1),))
    )
    assert rows[0]["failed"] == "failed: RuntimeError: no room on the device"
    assert rows[0]["seconds"] is None
    assert rows[1]["failed"] is None
    assert rows[1]["seconds"] >= 0
    assert rows[1]["targets"] == [{"quantity": "time_ratio", "most": 1, "got": None, "met": None}]


def test_distance_from_the_optimum():
    points = jnp.asarray([[[0.0], [2.0], [10.0], [12.0]]])
    fit = Contender("jaxvq", lambda: lambda seed, iterations: np.array([[[1.0], [12.0]]]), 1, judged=True)
    best = dataclasses.replace(problem(fit), points=points, k=2, optimum=lambda values: np.array([1.0, 11.0], "f"))
    assert race(best)[0]["optimum_ratio"] == pytest.approx(6 / 4)


def test_error_of_values_is_that_of_the_nearest_entry():
    values, codebook = np.random.default_rng(1).normal(size=500).astype("f"), np.array([0.5, -1.0, 2.0], "f")
    error = clustering_race.mean_squared_error(values[None, :, None], codebook[None, :, None])
    assert error == pytest.approx(((values[:, None] - codebook) ** 2).min(1).mean(), rel=1e-5)


def test_float32_lloyd_against_numpy():
    x = np.random.default_rng(2).normal(size=(200, 3)).astype("f")
    start = np.concatenate([x[:4], np.full((1, 3), 99, "f")])  # the last one never has a point
    centroids = start.astype(np.float64)
    for _ in range(3):
        codes = ((x[:, None] - centroids) ** 2).sum(-1).argmin(1)
        centroids = np.stack([x[codes == i].mean(0) if (codes == i).any() else c for i, c in enumerate(centroids)])
    found = clustering_race.float32_lloyd(jnp.asarray(x), jnp.asarray(start), jnp.int32(3))
    np.testing.assert_allclose(found, centroids, rtol=1e-4, atol=1e-5)


def test_limits_of_a_known_case():
    chip = Chip(nbytes=1e12, half_flops=1e15, lanes=1e13)
    limits = clustering_race.lloyd_limits(2**21, 8, 65536, chip)
    # 8 values in three parts are 24 columns, padded to 32; 2**37 scores.
    assert limits == pytest.approx({"bytes": 2**26 / 1e12, "matrix units": 2**43 / 1e15, "argmin": 2**37 / 1e13})
    assert clustering_race.lloyd_limits(1000, 128, 1020, chip)["matrix units"] == pytest.approx(
        2 * 1000 * 1024 * 128 / 1e15
    )
    assert clustering_race.sort_limits(3, 2**20, chip) == {"bytes": pytest.approx(3 * 2**22 * 10 / 1e12)}
    assert clustering_race.sort_limits(3, 4096, chip) == {"bytes": pytest.approx(3 * 2**14 * 3 / 1e12)}
    assert clustering_race.lloyd_limits(1000, 8, 16, None) == {}


def test_missing_peers_are_named(monkeypatch):
    for name in ("faiss", "sklearn.cluster", "torch", "flash_kmeans", "kmeans1d"):
        monkeypatch.setitem(sys.modules, name, None)
    said = []
    peers = clustering_contenders.find_peers("gpu", said.append)
    assert peers == {"PyTorch": None, "flash-kmeans": None, "kmeans1d": None}
    assert [text.split(" ")[0] for text in said] == ["PyTorch", "flash-kmeans", "kmeans1d"]
    assert all("its rows are left out" in text for text in said)
    assert clustering_contenders.find_peers("cpu", said.append)["faiss"] is None


def test_pytorch_without_a_gpu_is_left_out(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torch", types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    )
    monkeypatch.setitem(sys.modules, "flash_kmeans", types.SimpleNamespace())
    said = []
    peers = clustering_contenders.find_peers("gpu", said.append)
    assert (peers["PyTorch"], peers["flash-kmeans"]) == (None, None)
    assert "PyTorch sees no GPU" in said[-1]


def test_graphs_of_flash_kmeans_are_forgotten(monkeypatch):
    module = types.ModuleType("flash_kmeans.some_module")
    module._graph_cache = {"shape": "graph"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    clustering_contenders.forget({})
    assert module._graph_cache == {}  # type: ignore[attr-defined]


def test_writes_results_and_charts(tmp_path, monkeypatch, capsys):
    for name in ("faiss", "sklearn.cluster", "kmeans1d"):
        monkeypatch.setitem(sys.modules, name, None)
    cases = (
        Case("d2", "lloyd", 64, 4, dim=2, iterations=3, repeats=1, most=0.8),
        Case("impossible", "fit", 4, 8, dim=2),
    )
    curve = bench_kmeans.Scaling((64,), (4,), 64, dim=2, k=4, iterations=3, repeats=1)
    found = bench_kmeans.main(Config(cases, curve, json=tmp_path / "found.json", out=tmp_path / "out"))
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == json.loads(json.dumps(found["rows"]))
    assert (tmp_path / "out" / "results.json").exists()
    for name in ("bench_kmeans", "bench_kmeans_scaling"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    ours = next(row for row in found["rows"] if row["case"] == "d2" and row["contender"] == "jaxvq")
    assert ours["distortion_ratio"] == pytest.approx(1, rel=0.05)
    assert found["rows"][-1]["failed"].startswith("failed: ")
    assert {row["axis"] for row in found["scaling"]} == {"points", "entries"}
    assert "faiss is not installed" in capsys.readouterr().out


def test_palettes_race_against_iterations_of_others():
    case = Case("rows", "palettes", 40, 3, sets=2, iterations=4, most=1.0)
    found = bench_kmeans.palettes_problem(case, {}, bench_kmeans.CPU)
    assert [one.name for one in found.contenders] == ["jaxvq, optimal", "jaxvq, plain XLA"]
    ours, others = found.contenders
    assert clustering_race.counts(found, ours) == (4,)  # it has no iterations to tell apart
    assert clustering_race.counts(found, others) == (1, 4)
    assert found.compares == "seconds"
    assert {(target.quantity, target.most) for target in found.targets} == {
        ("time_ratio", 1.0),
        ("distortion_ratio", 1.001),
        ("optimum_ratio", 1.001),
    }


def test_only_some_rows(capsys):
    some = bench_kmeans.CPU.only(["weight", "scaling"])
    assert [case.name for case in some.cases] == ["weight"]
    assert some.cold == ()
    assert some.scaling == bench_kmeans.CPU.scaling
    with pytest.raises(ValueError, match=r"must name rows, got wieght; there are vectors, weight, .*cold, scaling"):
        bench_kmeans.CPU.only(["wieght"])
    with pytest.raises(SystemExit):
        bench_kmeans.cli(["--only", "wieght"])
    assert "there are vectors" in capsys.readouterr().err


def test_rows_of_the_gpu_are_those_of_the_claim():
    wanted = {(2**24, 1, 16, 1.0), (4096, 1, 16, 1.0), (2**20, 128, 1024, 1.0)}
    wanted |= {(2**21, 8, k, most) for k, most in ((256, 0.8), (4096, 0.8), (65536, 0.5))}
    assert {(case.points, case.dim, case.k, case.most) for case in bench_kmeans.GPU.cases} == wanted


def test_cold_process_tells_time_and_programs():
    row = bench_kmeans.cold_row("tiny", "KMeans(bits=4)")
    assert row["fit_palettes_programs"] == 1
    assert row["fit_product_programs"] == 0
    assert row["seconds"] > 0
    assert row["import_seconds"] > 0
    assert row["cpu_seconds"] > 0
    assert "'huge'" in bench_kmeans.cold_row("huge", "KMeans(bits=4)")["failed"]


def test_networks_of_the_cold_processes():
    from experiments.train import ConvNet

    images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    model = ConvNet((16, 16, 32), 300, 10)
    params = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), images)["params"]
    kernels = {name: layer["kernel"].shape for name, layer in params.items() if "kernel" in layer}
    assert clustering_cold.NETWORKS["tradeoff, 28 x 28"] == kernels
    shapes = clustering_cold.NETWORKS["50 layers, 20 shapes"].values()
    assert (len(shapes), len(set(shapes))) == (50, 20)
    assert min(math.prod(shape) for shape in shapes) >= 256 * 4


def test_finding_counts_what_is_known():
    met = {"met": True}, {"met": False}, {"met": None}
    rows = [{"judged": True, "time_ratio": ratio, "targets": met} for ratio in (0.5, 0.25)]
    assert clustering_charts.finding(rows) == "jaxvq takes 0.25 to 0.5 times as long as its rivals; 2 of 4 targets met"
