import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvq
from experiments import cifar, resnet, resnet_pq
from experiments.data import DatasetUnavailableError

SPEC = resnet_pq.RECIPES[resnet_pq.FOUR_BITS]


@pytest.fixture(scope="module")
def study() -> resnet_pq.Study:
    """A network of one convolution and the dense layer, which compiles in no time."""
    model, dataset = resnet.ResNet20(widths=(16, 32, 64), blocks=0), cifar.synthetic(50)
    image = np.zeros((1, 32, 32, 3), np.float32)
    shapes: Any = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    generator = np.random.default_rng(0)  # to run Flax's own initializers takes seconds
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.1, 0.9, leaf.shape), leaf.dtype), dict(shapes)
    )
    stats = resnet.sensitivity(model, variables, dataset, count=10)
    return resnet_pq.Study(resnet_pq.parse(["--smoke"]), model, variables, dataset, stats)


def test_a_run_writes_table_figure_network_and_figures(tmp_path, monkeypatch, study, capsys):
    config = dataclasses.replace(study.config, recipes=(resnet_pq.FOUR_BITS,), by_layer=True, out=tmp_path / "out")
    monkeypatch.setattr(resnet_pq, "prepare", lambda config: dataclasses.replace(study, config=config))
    monkeypatch.setattr(resnet_pq, "tune", lambda model, variables, *_, **__: variables)
    found = resnet_pq.main(config)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert (tmp_path / "out" / "resnet_pq.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["name"], row["way"]) for row in found["results"]] == [
        ("float", "clustered"),
        ("4-bit palettes", "by importance"),
        ("float", "fine-tuned"),
        ("4-bit palettes", "fine-tuned"),
        ("4-bit palettes", "layer by layer"),
    ]
    assert found["results"][0]["bits_per_weight"] == pytest.approx(32, abs=3)
    assert found["chosen"]["accuracy_loaded"] == found["chosen"]["accuracy"]
    path = tmp_path / "out" / found["chosen"]["file"]
    assert path.stat().st_size == found["chosen"]["file_nbytes"]
    assert "layer by layer" in capsys.readouterr().out


def test_layer_by_layer_quantizes_one_more_each_time_in_as_many_steps(study, monkeypatch):
    seen = []

    def spy(model, variables, dataset, config, *, teacher, progress):
        kernels = {name: layer["kernel"] for name, layer in variables["params"].items() if "kernel" in layer}
        seen.append(
            (
                config.epochs,
                config.seed,
                sorted(filter(lambda n: isinstance(kernels[n], jaxvq.QuantizedArray), kernels)),
            )
        )
        return variables

    monkeypatch.setattr(resnet_pq, "tune", spy)
    study.tuned_by_layer(SPEC, "", teacher=study.variables)
    assert seen == [(0.5, 0, ["conv1"]), (0.5, 1, ["conv1", "linear"])]


def test_what_is_stored_has_int8_centroids_and_float16_for_the_rest(study):
    variables = study.quantized(SPEC, importance=True)
    kept = resnet_pq.stored(variables)
    kernel, exact = kept["params"]["conv1"]["kernel"], variables["params"]["conv1"]["kernel"]
    assert kernel.decoder.vectors.dtype == np.int8
    assert kept["params"]["bn1"]["scale"].dtype == kept["batch_stats"]["bn1"]["var"].dtype == np.float16
    error = np.abs(np.asarray(kernel.dequantize() - exact.dequantize())).max(axis=(0, 1, 2))
    assert np.all(error <= np.abs(np.asarray(exact.dequantize())).max(axis=(0, 1, 2)) / 254 * 1.001)
    assert np.any(error > 0)


def test_bits_are_those_of_the_file(study, tmp_path):
    kept = resnet_pq.stored(study.quantized(SPEC, importance=False))
    result = study.measure("x", kept, time.perf_counter(), way="clustered")
    file_nbytes = resnet_pq.keep(
        dataclasses.replace(study, config=dataclasses.replace(study.config, out=tmp_path)), kept, result
    )["file_nbytes"]
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert file_nbytes - header == result.nbytes
    values = 16 * 27 + 4 * 16 + 160 + 10
    assert result.bits_per_weight == pytest.approx(8 * result.nbytes / values)
    kernels = [kept["params"][name]["kernel"].nbytes for name in ("conv1", "linear")]
    assert result.kernel_bits == pytest.approx(8 * sum(kernels) / (16 * 27 + 160))


def test_a_network_that_changes_on_disk_is_an_error(study, tmp_path):
    config = dataclasses.replace(study.config, out=tmp_path)
    kept = resnet_pq.stored(study.quantized(SPEC, importance=False))
    result = study.measure("x", kept, time.perf_counter(), way="clustered")
    with pytest.raises(RuntimeError, match=r"model.*: the loaded network's accuracy is .*, before saving it was 2\.0"):
        resnet_pq.keep(dataclasses.replace(study, config=config), kept, dataclasses.replace(result, accuracy=2.0))


def test_every_recipe_but_the_four_bit_one_fits_the_limit_with_everything_counted():
    shapes = jax.eval_shape(
        lambda: resnet.ResNet20().init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False)
    )
    for name, spec in resnet_pq.RECIPES.items():
        templates = {}
        for entry in jaxvq.resolve(shapes["params"], spec).entries:
            templates[entry.path] = entry.template or jax.ShapeDtypeStruct(entry.shape, entry.dtype)
        kept = jax.eval_shape(resnet_pq.stored, {"params": templates, "batch_stats": dict(shapes["batch_stats"])})
        bits = jaxvq.report(None, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), kept)).bits_per_weight
        assert (bits <= resnet_pq.LIMIT) == (name != resnet_pq.FOUR_BITS), name


def test_missing_data_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.delenv(cifar.VARIABLE, raising=False)
    with pytest.raises(DatasetUnavailableError, match=cifar.VARIABLE):
        resnet_pq.main(resnet_pq.parse(["--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_the_command_line_sets_the_training():
    config = resnet_pq.parse(
        ["--epochs=2", "--learning-rate=0.01", "--distilled=0.5", "--seed=3", "--no-by-layer", "--validate"]
    )
    assert config.train == resnet.TuneConfig(2, 64, 0.01, 0.5, 3)
    assert (config.by_layer, config.validate, config.seed) == (False, True, 3)
