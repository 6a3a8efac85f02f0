import dataclasses
import json

import numpy as np
import pytest

import jaxvq
from experiments import tradeoff
from experiments.data import DatasetUnavailableError


def result(nbytes: int, accuracy: float, family: str = "KMeans, tensor") -> tradeoff.Result:
    return tradeoff.Result(family, "4 bits", 4.0, nbytes, 8.0, 20.0, accuracy)


def test_smoke_run_writes_table_figure_model_and_figures(tmp_path, capsys):
    config = tradeoff.parse(["--smoke", "--out", str(tmp_path / "out")])
    found = tradeoff.main(dataclasses.replace(config, points=config.points[:3]))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert (tmp_path / "out" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    chosen = found["chosen"]
    assert chosen["accuracy_loaded"] == chosen["accuracy_before"] >= found["variants"][0]["accuracy"] - 0.01
    path = tmp_path / "out" / chosen["file"]
    assert path.stat().st_size == chosen["file_nbytes"]
    assert "params" in jaxvq.load(path)
    assert found["variants"][0]["ratio"] == pytest.approx(1, abs=0.05)
    assert "Symmetric, tensor" in capsys.readouterr().out


def test_choose_takes_the_smallest_that_lost_no_more_than_allowed():
    results = [result(100, 0.98), result(10, 0.9699), result(40, 0.97), result(50, 0.99)]
    assert tradeoff.choose(results, tolerance=0.01) == 2


def test_choose_takes_the_better_of_two_equal_sizes():
    assert tradeoff.choose([result(100, 0.98), result(40, 0.975), result(40, 0.98)], tolerance=0.01) == 2


def test_choose_falls_back_to_the_float_network():
    assert tradeoff.choose([result(100, 0.98), result(40, 0.5)], tolerance=0.01) == 0


def test_a_model_that_changes_on_disk_is_an_error(tmp_path, monkeypatch):
    config = tradeoff.parse(["--smoke", "--out", str(tmp_path)])
    monkeypatch.setattr(tradeoff, "accuracy", lambda *_: 0.8)
    variables = {"params": {"Dense_0": {"kernel": np.eye(4, dtype=np.float32)}}}
    point = tradeoff.on_all("Uniform, tensor", jaxvq.Uniform(bits=8))
    with pytest.raises(RuntimeError, match=r"model.*: the loaded model's accuracy is 0\.8, before saving it was 0\.9"):
        tradeoff.keep(point, result(100, 0.9), variables, model=None, dataset=None, config=config)  # type: ignore[arg-type]


def test_every_method_is_tried_and_each_way_has_a_name_and_a_style_of_its_own():
    points = tradeoff.all_points()
    families = {point.family for point in points}
    methods = {family.partition(",")[0] for family in families}
    assert methods == {"float", "Uniform", "Symmetric", "KMeans", "Product", "RowVQ", "Residual"}
    assert len({(point.family, point.rate) for point in points}) == len(points)
    assert len({tradeoff._style(family) for family in families}) == len(families)


def test_missing_data_is_not_hidden(tmp_path, monkeypatch):
    def unavailable(name):
        raise DatasetUnavailableError(f"{name} is not here")

    monkeypatch.setattr(tradeoff, "load", unavailable)
    with pytest.raises(DatasetUnavailableError, match="mnist is not here"):
        tradeoff.main(tradeoff.parse(["--dataset", "mnist", "--out", str(tmp_path)]))
