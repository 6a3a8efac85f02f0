import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxvq
import jaxvq.linen
from experiments import mnist_mlp
from experiments.data import Dataset, DatasetUnavailableError

PIXELS = 16


def stripes(count: int) -> Dataset:
    """Two classes that a glance tells apart: a bright upper or a bright lower half."""
    labels = (np.arange(count) % 2).astype(np.int32)
    images = np.random.default_rng(0).uniform(0, 0.2, (count, 4, 4, 1)).astype(np.float32)
    images[labels == 0, :2] += 0.8
    images[labels == 1, 2:] += 0.8
    return Dataset("stripes", 2, images, labels, images[: count - 3], labels[: count - 3])


@pytest.fixture(scope="module")
def data() -> mnist_mlp.Data:
    dataset = stripes(96)
    return mnist_mlp.as_data(dataset.train_images, dataset.train_labels)


@pytest.fixture(scope="module")
def trained(data) -> mnist_mlp.Variables:
    start = jax.jit(mnist_mlp.Network().init)(jax.random.key(0), data[0][:1])
    return mnist_mlp.fit(mnist_mlp.Network(), mnist_mlp.Training(6, 0.1, batch_size=8), start, data, seed=0)


def row(name: str, kind: str, nbytes: int, held_out: float) -> mnist_mlp.Row:
    return {"name": name, "kind": kind, "nbytes": nbytes, "held_out": [held_out]}


def test_run_writes_table_figure_models_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist_mlp, "load", lambda name: stripes(96))
    monkeypatch.setattr(mnist_mlp, "hold_out", lambda dataset: dataset)  # the same shapes compile once
    config = mnist_mlp.parse(["--smoke", "--out", str(tmp_path / "out")])
    exact, rounded, rows = config.variants
    short = mnist_mlp.Training(1, 1e-3, batch_size=16)
    quick = mnist_mlp._layerwise(rows.name, (jaxvq.Symmetric(bits=4), None, None), short)  # compiles in no time
    variants = (*(dataclasses.replace(one, training=short) for one in (exact, rounded)), quick)
    found = mnist_mlp.main(dataclasses.replace(config, variants=variants))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert (tmp_path / "out" / "mnist_mlp.png").read_bytes().startswith(b"\x89PNG")
    exact, rounded, rows = found["rows"]
    assert found["best"] == {one["kind"]: one["name"] for one in (exact, rounded, rows)}
    weights, biases = PIXELS * 128 + 128 * 64 + 64 * 10, 4 * (128 + 64 + 10)
    assert exact["nbytes"] == 4 * weights + biases
    assert rounded["nbytes"] == weights // 2 + biases + 3 * 4  # and one scale for each layer
    assert rows["nbytes"] == PIXELS * 128 // 2 + 4 + 4 * (128 * 64 + 64 * 10) + biases
    (file,) = found["files"]
    assert (tmp_path / "out" / file["file"]).stat().st_size == file["file_nbytes"] > rows["nbytes"]
    assert file["accuracy_loaded"] == rows["accuracy"][0] == rows["held_out"][0]
    assert "row VQ, 10%" in capsys.readouterr().out


def test_pixels_lie_between_minus_one_and_one(data):
    images, labels = data
    assert images.shape == (96, PIXELS)
    assert -1 <= images.min() < -0.9
    assert 0.9 < images.max() <= 1
    np.testing.assert_allclose(images[5], stripes(96).train_images[5].reshape(-1) * 2 - 1, atol=1e-6)
    assert labels[5] == 1


def test_held_out_images_are_the_end_of_the_training_images_and_none_is_in_both_parts():
    dataset = stripes(96)
    held = mnist_mlp.hold_out(dataset)
    assert (len(held.train_labels), len(held.test_labels)) == (80, 16)
    np.testing.assert_array_equal(np.concatenate([held.train_images, held.test_images]), dataset.train_images)
    np.testing.assert_array_equal(held.test_labels, dataset.train_labels[80:])


def test_network_has_three_dense_layers_with_relu_between_them(data, trained):
    x = np.asarray(data[0], np.float64)
    for index in range(3):
        layer = trained["params"][f"Dense_{index}"]
        x = np.maximum(x, 0) if index else x
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
    assert trained["params"]["Dense_1"]["kernel"].shape == (128, 64)
    np.testing.assert_allclose(mnist_mlp.Network().apply(trained, data[0]), x, rtol=1e-4, atol=1e-4)
    assert mnist_mlp.accuracy(mnist_mlp.Network(), trained, data) == np.mean(np.argmax(x, -1) == data[1]) == 1


def test_decoders_train_and_their_codes_stay(data, trained):
    variant = mnist_mlp._layerwise(
        "few levels", (jaxvq.Symmetric(bits=2), None, None), mnist_mlp.Training(2, 1e-2, adam=True)
    )
    before = mnist_mlp.begin(variant, trained["params"], data[0], key=jax.random.key(0))
    after = mnist_mlp.fit(variant.network, variant.training, before, data, seed=1)
    old, new = (jaxvq.linen.from_variables(variables)["Dense_0"]["kernel"] for variables in (before, after))
    np.testing.assert_array_equal(old.unpack(), new.unpack())
    assert not np.array_equal(old.decoder.scale, new.decoder.scale)
    assert len(np.unique(new.dequantize())) == 3


def test_rounded_layers_see_sixteen_levels_of_inputs_and_fifteen_of_weights(data, trained):
    variant = next(one for one in mnist_mlp.all_variants(8) if one.name == "W4A4, tracked range")
    variables = mnist_mlp.begin(variant, trained["params"], data[0], key=jax.random.key(0))
    spans = [variables["quantization"][f"Dense_{index}"]["input_range"] for index in range(3)]
    np.testing.assert_allclose(spans[0], [data[0].min(), data[0].max()], rtol=1e-6)
    assert [float(span[0]) for span in spans[1:]] == [0, 0]  # after ReLU
    kernel = np.asarray(trained["params"]["Dense_0"]["kernel"], np.float64)
    step = (kernel.max() - kernel.min()) / 14
    levels = np.clip(np.round(kernel / step), -7, 7) * step
    low, high = np.asarray(spans[0], np.float64)
    x = low + np.round((np.asarray(data[0], np.float64) - low) / (high - low) * 15) * (high - low) / 15
    _, seen = variant.network.apply(variables, data[0], capture_intermediates=True)
    out = seen["intermediates"]["Dense_0"]["__call__"][0] - trained["params"]["Dense_0"]["bias"]
    np.testing.assert_allclose(out, x @ levels, rtol=1e-3, atol=1e-3)


def test_every_variant_has_a_name_and_codebooks_fit_the_bytes_of_row_vq_on_mnist():
    variants = mnist_mlp.all_variants(64)
    assert len({variant.name for variant in variants}) == len(variants)
    assert {variant.kind for variant in variants} == {mnist_mlp.FLOAT, mnist_mlp.ROUNDED, mnist_mlp.CODEBOOKS}
    shapes = jax.eval_shape(mnist_mlp.Network().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 784), "float32"))
    plans = {one.name: jaxvq.resolve(shapes["params"], one.spec) for one in variants if one.spec is not None}
    nbytes = {name: sum(leaf.nbytes for leaf in plan.entries) for name, plan in plans.items()}
    assert nbytes[mnist_mlp.BUDGET] == 44_160
    assert max(nbytes.values()) == nbytes[mnist_mlp.BUDGET]


def test_choose_goes_by_held_out_images_and_the_bytes_of_row_vq():
    rows = [
        row(mnist_mlp.BUDGET, mnist_mlp.CODEBOOKS, 100, 0.5),
        row("too large", mnist_mlp.CODEBOOKS, 101, 0.9),
        row("fits", mnist_mlp.CODEBOOKS, 100, 0.8),
        row("as good and smaller", mnist_mlp.CODEBOOKS, 90, 0.8),
        row("rounded", mnist_mlp.ROUNDED, 200, 0.7),
    ]
    assert mnist_mlp.choose(rows, mnist_mlp.CODEBOOKS) == "as good and smaller"
    assert mnist_mlp.choose(rows, mnist_mlp.ROUNDED) == "rounded"


def test_a_model_that_changes_on_disk_is_an_error(tmp_path, monkeypatch):
    config = mnist_mlp.parse(["--smoke", "--out", str(tmp_path)])
    variant = mnist_mlp._layerwise("palette", (None, None, None), config.first)
    run = mnist_mlp.Run(variant, 100, 0.5, 0.9, {"Dense_0": {"kernel": np.eye(4, dtype=np.float32)}})
    monkeypatch.setattr(mnist_mlp, "accuracy", lambda *_: 0.8)
    with pytest.raises(
        RuntimeError, match=r"palette.*: the loaded model's accuracy is 0\.8, before saving it was 0\.9"
    ):
        mnist_mlp.keep(run, stripes(8), config)


def test_missing_data_is_not_hidden(tmp_path, monkeypatch):
    def unavailable(name):
        raise DatasetUnavailableError(f"{name} is not here")

    monkeypatch.setattr(mnist_mlp, "load", unavailable)
    with pytest.raises(DatasetUnavailableError, match="mnist is not here"):
        mnist_mlp.main(mnist_mlp.parse(["--out", str(tmp_path)]))


def test_the_float_network_is_of_stock_layers_and_three_seeds_are_the_default():
    config = mnist_mlp.parse([])
    assert config.variants[0].network.dense is nn.Dense
    assert (config.seeds, config.first.epochs, config.first.batch_size) == (3, 10, 64)
    assert dataclasses.replace(config.first, batch_size=16) == mnist_mlp.parse(["--dataset", "digits"]).first
