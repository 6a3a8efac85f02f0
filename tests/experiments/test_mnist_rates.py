import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvq
from experiments import mnist_mlp, mnist_rates, rate_curves
from experiments.data import Dataset, DatasetUnavailableError

PIXELS = 16
BIASES = 4 * (128 + 64 + 10)
SHAPES = ((784, 128), (128, 64), (64, 10))


def stripes(count: int) -> Dataset:
    """Two classes that a glance tells apart: a bright upper or a bright lower half."""
    labels = (np.arange(count) % 2).astype(np.int32)
    images = np.random.default_rng(0).uniform(0, 0.2, (count, 4, 4, 1)).astype(np.float32)
    images[labels == 0, :2] += 0.8
    images[labels == 1, 2:] += 0.8
    return Dataset("stripes", 2, images, labels, images, labels)


def params_of(seeds: int, pixels: int = PIXELS) -> mnist_rates.Params:
    """Stacked parameters of the three layers."""
    generator = np.random.default_rng(0)
    sides = (pixels, 128, 64, 10)
    layers = {}
    for index, (height, width) in enumerate(itertools.pairwise(sides)):
        kernel = generator.normal(size=(seeds, height, width)) / height**0.5
        bias = generator.normal(size=(seeds, width)) / 10
        layers[f"Dense_{index}"] = {"kernel": jnp.asarray(kernel, "float32"), "bias": jnp.asarray(bias, "float32")}
    return layers


def logits_of(params: mnist_rates.Params, images: np.ndarray, seed: int) -> np.ndarray:
    """The network in numpy."""
    x = np.asarray(images, np.float64)
    for index in range(3):
        layer = {name: np.asarray(leaf[seed], np.float64) for name, leaf in params[f"Dense_{index}"].items()}
        x = (np.maximum(x, 0) if index else x) @ layer["kernel"] + layer["bias"]
    return x


def row(kind: str, nbytes: int, held_out: float, family: str = "", label: str = "0.1", **rest) -> rate_curves.Row:
    accuracies = {"before": [held_out - 0.1], "held_out": [held_out], "accuracy": [held_out - 0.01]}
    return {"kind": kind, "family": family, "label": label, "nbytes": nbytes, "centroids": [], **accuracies, **rest}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A small run of everything."""
    out = tmp_path_factory.mktemp("run") / "out"
    config = mnist_rates.parse(["--smoke", "--out", str(out)])
    short = mnist_mlp.Training(1, 1e-3, batch_size=16)
    first = dataclasses.replace(short, rate=0.1)
    ways = (config.ways[0], dataclasses.replace(config.printed, kind=mnist_rates.VECTOR))
    config = dataclasses.replace(config, first=first, warm_up=(2, 1), published=short, trainings=(short,), ways=ways)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_rates, "load", lambda name: stripes(96))
        patch.setattr(mnist_rates, "hold_out", lambda dataset: dataset)  # the same shapes compile once
        patch.setattr(mnist_rates, "_start", lambda keys, images: params_of(len(keys)))  # Flax's compile for seconds
        return out, mnist_rates.main(config)


def test_run_writes_figures_and_results(outcome):
    out, found = outcome
    assert json.loads((out / "results.json").read_text()) == found
    for name in ("mnist_rates.png", "mnist_rates_rows.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert found["trainings"] == dict.fromkeys(("float", "vectors"), "SGD 0.001")
    floats, vectors = found["rows"]
    weights = PIXELS * 128, 128 * 64, 64 * 10
    assert floats["nbytes"] == 4 * sum(weights) + BIASES
    codes = -(-10 // 32) * 4
    assert vectors["nbytes"] == 4 * sum(weights[:2]) + codes + 4 * 64 + BIASES
    rest = vectors["nbytes"] - 4 * 64
    assert {one["stored"]: one["nbytes"] - rest for one in vectors["centroids"]} == {
        "bfloat16": 2 * 64,
        "int8": 64 + 4,
        "Uniform(bits=4)": 64 // 2 + 8,
    }


def test_warm_up_ends_where_the_published_losses_were(outcome):
    printed = outcome[1]["printed"]
    assert printed["epochs"] == [1, 3, 4]
    assert len(printed["losses"]) == 4
    assert printed["losses"][3] < printed["losses"][0]
    config = mnist_rates.parse([])
    assert (config.first.epochs, config.first.rate, config.first.batch_size) == (5, 0.1, 64)
    assert (config.first.epochs + config.warm_up[0], config.first.epochs + sum(config.warm_up)) == (15, 30)
    assert config.published == mnist_mlp.Training(5, 1e-3)
    assert config.printed.methods == (jaxvq.RowVQ(fraction=0.1),) * 3
    assert config.seeds == 3


def test_with_one_row_in_the_last_layer_all_images_get_the_class_of_the_largest_bias(outcome):
    printed = outcome[1]["printed"]
    assert printed["spread"] == [0]
    assert printed["rows"] == printed["share"]
    assert max(printed["float"][2]) > 0.9  # the network itself can tell the classes apart


def test_spread_of_logits_leaves_out_the_bias():
    params = params_of(2)
    params["Dense_2"]["kernel"] = params["Dense_2"]["kernel"].at[1].set(params["Dense_2"]["kernel"][1, :, :1])
    images = np.random.default_rng(1).normal(size=(5, PIXELS)).astype(np.float32)
    spread = mnist_rates.spread_of_logits(params, jnp.asarray(images))
    bare = logits_of(params, images, 0) - np.asarray(params["Dense_2"]["bias"][0])
    np.testing.assert_allclose(spread[0], np.max(bare.max(axis=1) - bare.min(axis=1)), rtol=1e-4)
    assert spread[1] == 0


def test_networks_that_train_together_train_as_alone():
    dataset = stripes(32)
    data = mnist_mlp.as_data(dataset.train_images, dataset.train_labels)
    params, training = params_of(2), mnist_mlp.Training(2, 1e-2, batch_size=8)
    together = mnist_rates.fit_all(mnist_mlp.Network(), training, {"params": params}, data, first_seed=5)["params"]
    for seed in range(2):
        alone = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        alone = mnist_mlp.fit(mnist_mlp.Network(), training, {"params": alone}, data, seed=5 + seed)["params"]
        jax.tree.map(lambda a, b, seed=seed: np.testing.assert_allclose(a[seed], b, atol=1e-4), together, alone)


def test_measure_is_loss_and_accuracy_of_each_network():
    dataset = stripes(7)
    data, params = mnist_mlp.as_data(dataset.train_images, dataset.train_labels), params_of(2)
    losses, accuracies = mnist_rates.measure(params, data)
    for seed in range(2):
        logits = logits_of(params, np.asarray(data[0]), seed)
        likely = logits - np.log(np.sum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1, keepdims=True))
        likely -= logits.max(axis=1, keepdims=True)
        np.testing.assert_allclose(losses[seed], -np.mean(likely[np.arange(7), dataset.train_labels]), rtol=1e-4)
        assert accuracies[seed] == np.mean(logits.argmax(axis=1) == dataset.train_labels)


def test_int8_centroids_are_whole_multiples_of_a_scale_for_each_network_and_stage():
    vectors = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 8, 4)).astype(np.float32)
    vectors[1, 0, 0, 1] = 0
    stored = mnist_rates.in_int8(jnp.asarray(vectors))
    assert stored.scale is not None
    assert (stored.vectors.dtype, stored.scale.shape) == (jnp.int8, (2, 1, 1, 2, 1, 1))
    for seed, stage in np.ndindex(2, 2):
        table = vectors[seed, 0, 0, stage]
        step = np.abs(table).max() / 127 or 1.0
        np.testing.assert_array_equal(stored.vectors[seed, 0, 0, stage], np.rint(table / step))
        np.testing.assert_allclose(stored.scale[seed, 0, 0, stage], step, rtol=1e-6)


def test_centroids_become_codes_of_their_own():
    layout = jaxvq.Residual(stages=2, k=16, dim=8).layout((PIXELS, 128), "float32")
    zeros = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape), leaf.dtype), jaxvq.Residual(k=16).template(layout))
    vectors = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 16, 8)).astype(np.float32)
    weight = dataclasses.replace(zeros, decoder=jaxvq.Codebook(jnp.asarray(vectors)))
    params = {"kernel": weight, "bias": jnp.zeros((2, 128))}
    method = jaxvq.Uniform(bits=4)
    small, nbytes = mnist_rates.with_centroids(params, lambda tables: mnist_rates.in_codes(tables, method))
    codes, codebooks = 2 * 2 * 128 * 4 // 8, 2 * (16 * 8 * 4 // 8 + 8)
    assert nbytes == codes + codebooks + 4 * 128
    found = np.asarray(small["kernel"].decoder.vectors)
    assert found.shape == vectors.shape
    for seed, stage in np.ndindex(2, 2):
        table = vectors[seed, 0, 0, stage]
        step = (table.max() - table.min()) / 15
        levels = table.min() + np.rint((table - table.min()) / step) * step
        np.testing.assert_allclose(found[seed, 0, 0, stage], levels, atol=1e-5)
    decoded = jaxvq.dequantize_params(small)["kernel"]  # all codes are 0
    np.testing.assert_allclose(decoded[1, :8, 3], found[1, 0, 0, :, 0].sum(axis=0), rtol=1e-6)


def test_palettes_of_single_values_keep_their_centroids():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(1, PIXELS, 8)), "float32")}
    levels = mnist_rates.Way(mnist_rates.SCALAR, "levels", "4 bit", (jaxvq.Uniform(bits=4), None, None))
    quantized = mnist_rates.quantize({"Dense_0": params, "Dense_1": params, "Dense_2": params}, levels)
    small, nbytes = mnist_rates.with_centroids(quantized, mnist_rates.in_bfloat16)
    assert nbytes == PIXELS * 8 // 2 + 8 + 2 * 4 * PIXELS * 8  # a scale and a zero point
    np.testing.assert_array_equal(small["Dense_0"]["kernel"].dequantize(), quantized["Dense_0"]["kernel"].dequantize())


def test_every_way_has_a_name_and_fits_the_network_on_mnist():
    ways = mnist_rates.all_ways()
    assert len({(way.family, way.label) for way in ways}) == len(ways)
    kernels = {f"Dense_{index}/kernel": jax.ShapeDtypeStruct(shape, "float32") for index, shape in enumerate(SHAPES)}
    nbytes = {}
    for way in ways:
        rules = [jaxvq.Rule(path, method) for path, method in zip(kernels, way.methods, strict=True)]
        nbytes[way.family, way.label] = sum(entry.nbytes for entry in jaxvq.resolve(kernels, rules).entries)
    assert nbytes["float", ""] == 4 * 109_184
    assert nbytes["palette", "2 bit"] == 784 * 128 // 4 + 4 * 4 + (128 * 64 + 64 * 10) // 2 + 2 * 4 * 16
    assert nbytes["rows, every layer", "0.1"] == 4 * (12 * 784 + 6 * 128 + 64) + 64 + 24 + 4
    assert {way.kind for way in ways} == {"float", "single values", "vectors", "rows"}
    assert [way.family for way in ways if way.methods[2] is None] == ["float"] + 6 * ["rows, last layer whole"]


def test_curve_has_what_nothing_as_small_beats_on_held_out_images():
    found = [
        row("vectors", 300, 0.95, centroids=[{"stored": "int8", "nbytes": 90, "held_out": [0.94], "accuracy": [0.9]}]),
        row("vectors", 100, 0.8),
        row("vectors", 100, 0.9),
        row("vectors", 200, 0.9),
        row("single values", 50, 0.99),
    ]
    assert [one["nbytes"] for one in rate_curves.curve(found, "vectors")] == [100, 300]
    (small,) = rate_curves.curve(found, rate_curves.SMALL)
    assert (small["nbytes"], small["label"], small["accuracy"]) == (90, "0.1, int8", [0.9])
    assert rate_curves.curve(found, "rows") == []


def test_smallest_sizes_lose_at_most_a_point_against_float_on_held_out_images():
    found = [row("float", 900, 0.95), row("vectors", 100, 0.93), row("vectors", 200, 0.945), row("vectors", 300, 0.96)]
    smallest = rate_curves.smallest_sizes([*found, row("single values", 100, 0.9)])
    assert smallest["vectors"] == found[2]
    assert smallest["single values"] is None
    assert smallest[rate_curves.SMALL] is None


def test_figures_and_tables_say_what_was_found():
    small = {"stored": "int8", "nbytes": 12_000, "held_out": [0.96], "accuracy": [0.945]}
    found = [
        row("float", 437_000, 0.97),
        row("single values", 30_000, 0.965, "palette", "2 bit"),
        row("vectors", 20_000, 0.96, "product, d=4", "k=64", centroids=[small]),
        row("rows", 41_000, 0.12, "rows, every layer", centroids=[{**small, "accuracy": [0.11]}]),
        row("rows", 44_000, 0.93, "rows, last layer whole", centroids=[{**small, "accuracy": [0.92]}]),
    ]
    results = {"dataset": "stripes", "seeds": 1, "rows": found, "smallest": rate_curves.smallest_sizes(found)}
    rates, rows = rate_curves.draw_rates(results), rate_curves.draw_rows(results)
    title = rates.axes[0].get_title()
    assert "30.0 kB of single values, 20.0 kB of vectors" in title
    assert "12.0 kB of vectors whose centroids" in title
    legend = [text.get_text() for text in rates.legends[0].get_texts()]
    assert {"palette", "product, d=4", "float, trained on as long: 437 kB"} <= set(legend)
    assert "every layer 11.0% are right, with the last layer whole 92.0%" in rows.get_suptitle()
    assert "int8 instead of float32 cost at most 0.50 points" in rows.get_suptitle()
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in rows.axes[0].get_lines()}
    np.testing.assert_allclose(lines["vectors, in at most the bytes of rows, last layer whole"], [95])
    three = {"epochs": [5, 15, 30], "losses": [[0.5 / (1 + epoch)] for epoch in range(30)], "float": [[0.9]] * 3}
    printed = {**three, "w4a4": [0.91], "rows": [0.11], "share": [0.11], "spread": [0.0]}
    texts = []
    for table in rate_curves.tables({**results, "printed": printed, "trainings": {"vectors": "Adam 0.001"}}):
        texts.append([list(column.cells) for column in table.columns])
    assert "0.0736" in texts[0][1]
    assert "0.0333 ± 0.0000" in texts[0][2]  # after 15 epochs
    assert "94.50  12.0" in texts[2][3]


def test_missing_data_is_not_hidden(tmp_path, monkeypatch):
    def unavailable(name):
        raise DatasetUnavailableError(f"{name} is not here")

    monkeypatch.setattr(mnist_rates, "load", unavailable)
    with pytest.raises(DatasetUnavailableError, match="mnist is not here"):
        mnist_rates.main(mnist_rates.parse(["--out", str(tmp_path)]))
