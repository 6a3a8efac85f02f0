import dataclasses
import json
import math
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import rich.progress

import jaxvq
from experiments import cifar, resnet, resnet_grid, resnet_pq
from experiments.data import DatasetUnavailableError
from experiments.resnet_grid import BY_LAYER, TUNED, WEIGHED, Cell

STEM = resnet.ResNet20(widths=(16,), blocks=0)  # one convolution and the dense layer: compiles in no time


def kernels() -> dict[str, tuple[int, ...]]:
    """The shapes in a ResNet-20, by path, as the paper describes it."""
    shapes: dict[str, tuple[int, ...]] = {"conv1/kernel": (3, 3, 3, 16), "linear/kernel": (64, 10)}
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            before = width // 2 if stage > 1 and block == 0 else width
            shapes[f"layer{stage}_{block}/conv1/kernel"] = (3, 3, before, width)
            shapes[f"layer{stage}_{block}/conv2/kernel"] = (3, 3, width, width)
    return shapes


@pytest.fixture(scope="module")
def shapes() -> Any:
    model = resnet.ResNet20()
    return jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False))


@pytest.fixture(scope="module")
def study() -> resnet_pq.Study:
    dataset = cifar.synthetic(50)
    variables = resnet.random_variables(STEM, dataset.train_images)
    stats = resnet.sensitivity(STEM, variables, dataset, count=10)
    return resnet_pq.Study(resnet_pq.parse(["--smoke"]), STEM, variables, dataset, stats)


def made(cell: Cell, *, bits: float, clustered: float, by_layer: float, at_once: float) -> Cell:
    """The cell with results of these accuracies."""
    ways = {WEIGHED: clustered, BY_LAYER: by_layer, TUNED: at_once}
    results = [resnet_pq.Result(cell.name, way, bits, bits, 1, right, 1.0) for way, right in ways.items()]
    return dataclasses.replace(cell, results=tuple(results))


FLOATS = [
    resnet_pq.Result("float", way, 32, 32, 1, right, 1.0)
    for way, right in ((resnet_pq.PLAIN, 0.8), (resnet_pq.TUNED, 0.85))
]


@pytest.mark.parametrize("block_size", resnet_grid.BLOCK_SIZES)
@pytest.mark.parametrize("centroids", resnet_grid.CENTROIDS)
def test_a_layer_has_at_most_a_centroid_for_four_blocks_cut_from_its_filters(shapes, block_size, centroids):
    cell = resnet_grid.cell_of(shapes["params"], block_size=block_size, centroids=centroids)
    methods: dict[str, Any] = {rule.pattern: rule.method for rule in cell.spec.rules}
    assert methods.keys() == kernels().keys()
    assert methods.pop("conv1/kernel") == jaxvq.KMeans(bits=4)
    for path, method in methods.items():
        filters = np.zeros(kernels()[path]).reshape(-1, kernels()[path][-1]).T
        dim = 4 if path == "linear/kernel" else block_size
        blocks = filters.reshape(-1, dim)  # fails where blocks do not divide a filter
        assert method == jaxvq.Product(k=min(centroids, len(blocks) // 4), dim=dim), path
    assert cell.used() == {path: method.k for path, method in methods.items()}


def test_centroids_are_reported_for_each_stage_and_the_dense_layer(shapes):
    cells = [resnet_grid.cell_of(shapes["params"], block_size=18, centroids=k) for k in (256, 1024)]
    assert [resnet_grid.used_by_stage(cell) for cell in cells] == ["32, 64-128, 256, 40", "32, 64-128, 256-512, 40"]


def test_a_layer_that_the_blocks_do_not_divide_has_a_palette():
    sizes = {"block_size": 32, "centroids": 256}
    assert resnet_grid.method_of("a/kernel", (3, 3, 16, 16), **sizes) == jaxvq.KMeans(bits=4)
    assert resnet_grid.method_of("a/kernel", (3, 3, 32, 32), **sizes) == jaxvq.Product(k=72, dim=32)
    assert resnet_grid.method_of("a/kernel", (66, 10), **sizes) == jaxvq.KMeans(bits=4)


@pytest.mark.parametrize(("block_size", "centroids"), [(4, 256), (9, 1024), (18, 256)])
def test_bits_count_codes_codebooks_and_everything_else(shapes, block_size, centroids):
    cell = resnet_grid.cell_of(shapes["params"], block_size=block_size, centroids=centroids)
    templates = {}
    for entry in jaxvq.resolve(shapes["params"], cell.spec).entries:
        templates[entry.path] = entry.template or jax.ShapeDtypeStruct(entry.shape, entry.dtype)
    kept = jax.eval_shape(resnet.stored, {"params": templates, "batch_stats": dict(shapes["batch_stats"])})
    figures = jaxvq.report(None, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), kept))
    nbytes, weights, tensors = 0.0, 0, 0
    for path, shape in kernels().items():
        dim = 1 if path == "conv1/kernel" else 4 if path == "linear/kernel" else block_size
        k = cell.used().get(path, 16)
        codes = math.prod(shape) // dim * math.ceil(math.log2(k)) / 8
        nbytes, weights, tensors = nbytes + codes + k * dim + 4, weights + math.prod(shape), tensors + 3
    channels = 7 * 16 + 6 * 32 + 6 * 64
    values, tensors = weights + 4 * channels + 10, tensors + 4 * 19 + 1
    nbytes += 2 * (4 * channels + 10) + 4 * tensors
    # Only the ends of rows of codes, which fill whole words, are not in this count.
    assert nbytes <= figures.nbytes < 1.1 * nbytes
    assert figures.bits_per_weight == pytest.approx(8 * figures.nbytes / values)


def test_room_for_codes_changes_no_result_and_one_program_does_every_stage_and_length(study):
    spec = jaxvq.Symmetric(bits=4)  # its scales learn like a codebook does, and it needs no clustering
    params = study.variables["params"]
    quantized = jaxvq.quantize_params(params, spec, key=jax.random.key(0))
    stages = [
        params,
        {**params, "conv1": quantized["conv1"]},
        {**params, "conv1": quantized["conv1"], "linear": quantized["linear"]},
    ]
    config = resnet.TuneConfig(epochs=0.4, batch_size=10, learning_rate=1e-2)
    roomy = dataclasses.replace(config, spec=jaxvq.Spec(default=spec))
    parts = [dataclasses.replace(roomy, seed=seed, epochs=epochs) for seed, epochs in enumerate((0.2, 0.4, 0.6))]
    step: Any = resnet._step
    step.clear_cache()
    tuned = []
    for stage, part in zip(stages, parts, strict=True):
        variables = {**study.variables, "params": stage}
        tuned.append(resnet.tune(STEM, variables, study.dataset, part, teacher=study.variables))
        assert jax.tree.structure(tuned[-1]["params"]) == jax.tree.structure(stage)
    assert step._cache_size() == 1
    plain = dataclasses.replace(config, seed=1)
    variables = {**study.variables, "params": stages[1]}
    expected = resnet.tune(STEM, variables, study.dataset, plain, teacher=study.variables)
    for one, other in zip(jax.tree.leaves(tuned[1]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    before, after = (result["params"]["conv1"]["kernel"] for result in (variables, tuned[1]))
    assert not np.allclose(before.decoder.scale, after.decoder.scale)
    np.testing.assert_array_equal(before.codes.words, after.codes.words)


def test_a_cell_is_clustered_then_trained_in_both_ways_from_the_float_network(study, monkeypatch):
    steps, teacher_variables = [], {"teacher": 1}

    def spy(model, variables, dataset, config, *, teacher, progress):
        kernels = [layer["kernel"] for name, layer in sorted(variables["params"].items()) if "kernel" in layer]
        steps.append((config.epochs, [isinstance(kernel, jaxvq.QuantizedArray) for kernel in kernels]))
        assert teacher is teacher_variables
        return variables

    monkeypatch.setattr(resnet_pq, "tune", spy)
    cell = resnet_grid.cell_of(study.variables["params"], block_size=9, centroids=256)
    done = resnet_grid.run_cell(study, cell, teacher_variables)
    assert steps == [(0.5, [True, False]), (0.5, [True, True]), (1, [True, True])]
    assert [(result.name, result.way) for result in done.results] == [
        ("d=9, k=256", "by importance"),
        ("d=9, k=256", "layer by layer"),
        ("d=9, k=256", "fine-tuned"),
    ]
    assert len({(result.bits_per_weight, result.nbytes) for result in done.results}) == 1
    clustered = resnet.stored(study.quantized(cell.spec, importance=True))
    assert done.result(WEIGHED).accuracy == study.accuracy(clustered)
    assert clustered["params"]["linear"]["kernel"].decoder.vectors.shape == (1, 1, 1, 10, 4)


def test_a_run_works_on_cells_side_by_side_and_writes_them_in_order(tmp_path, monkeypatch, study, capsys):
    config = resnet_grid.parse(["--smoke", "--block-sizes", "4", "9", "--jobs=2", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(resnet_grid, "prepare", lambda config: dataclasses.replace(study, config=config))
    monkeypatch.setattr(resnet_pq, "tune", lambda model, variables, *_, **__: variables)
    second_is_done = threading.Event()

    def run_cell(study, cell, teacher):
        if cell.block_size == 4:
            assert second_is_done.wait(10)
            return made(cell, bits=4, clustered=0.1, by_layer=0.2, at_once=0.1)
        second_is_done.set()
        return made(cell, bits=2, clustered=0.1, by_layer=0.2, at_once=0.3)

    monkeypatch.setattr(resnet_grid, "run_cell", run_cell)
    found = resnet_grid.main(config)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert (tmp_path / "out" / "resnet_grid.png").read_bytes().startswith(b"\x89PNG")
    assert [(cell["block_size"], cell["centroids"]) for cell in found["cells"]] == [(4, 256), (9, 256)]
    assert [result["way"] for result in found["float"]] == ["clustered", "fine-tuned"]
    assert found["cells"][1]["results"][2]["accuracy"] == 0.3
    assert found["cells"][0]["spec"]["rules"][1]["method"]["k"] == 10
    assert "by layer" in capsys.readouterr().out


def test_the_finding_names_the_smallest_cell_near_float_or_the_best_one():
    small, large = (Cell(size, 256, jaxvq.Spec()) for size in (9, 4))
    cells = [
        made(small, bits=2.0, clustered=0.1, by_layer=0.821, at_once=0.83),
        made(large, bits=3.0, clustered=0.1, by_layer=0.84, at_once=0.82),
    ]
    assert resnet_grid.finding(cells, FLOATS[1]) == (
        "within 3 points of float at 2.00 bits per weight (d=9, k=256); "
        "layer by layer beats all at once in 1 of 2 cells"
    )
    far = [made(small, bits=2.0, clustered=0.1, by_layer=0.75, at_once=0.83)]
    assert resnet_grid.finding(far, FLOATS[1]) == (
        "10.0 points below float at best, at 2.00 bits per weight (d=9, k=256); "
        "layer by layer beats all at once in 0 of 1 cells"
    )


def test_table_and_figure_show_every_cell(shapes, study):
    sizes = [(size, k) for size in (4, 8, 9, 18) for k in (256, 1024)]
    cells = [resnet_grid.cell_of(shapes["params"], block_size=size, centroids=k) for size, k in sizes]
    cells = [made(cell, bits=3.21, clustered=0.1, by_layer=0.7, at_once=0.6) for cell in cells]
    figure = resnet_grid.draw(cells, FLOATS, study=study)
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == [f"{size} x {k}" for size, k in sizes]
    title: Any = figure.get_suptitle()
    assert resnet_grid.finding(cells, FLOATS[1]) in title.replace("\n", " ")
    console = rich.console.Console(width=150)
    with console.capture() as capture:
        console.print(resnet_grid.table_of(cells, FLOATS, images=10_000))
    rows = [line.split() for line in capture.get().splitlines() if "3.21" in line]
    assert [(int(row[0]), int(row[1])) for row in rows] == sizes
    assert " ".join(rows[0]) == "4 256 144, 256, 256, 40 3.21 3.21 10.00 70.00 60.00 15.00"


def test_bars_of_several_threads_go_when_they_are_done():
    with rich.progress.Progress(disable=True) as bars:
        shown: Any = resnet_grid.progress_in(bars)("a")(range(3))
        assert next(shown) == 0
        assert [(task.description, task.total) for task in bars.tasks] == [("a", 3)]
        assert list(shown) == [1, 2]
        assert not bars.tasks


def test_a_smoke_run_needs_no_data(monkeypatch):
    monkeypatch.delenv(cifar.VARIABLE, raising=False)
    seen = {}
    monkeypatch.setattr(resnet_pq, "weighed", lambda config, *rest: seen.setdefault("network", rest))
    config = resnet_grid.parse(["--smoke"])
    resnet_grid.prepare(config.network)
    model, variables, dataset = seen["network"]
    assert sorted(variables["params"]) == ["bn1", "conv1", "layer1_0", "linear"]
    assert (model.widths, dataset.name) == ((16,), "synthetic")
    assert all(jnp.all(leaf > 0) for leaf in jax.tree.leaves(variables))


def test_missing_data_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.delenv(cifar.VARIABLE, raising=False)
    with pytest.raises(DatasetUnavailableError, match=cifar.VARIABLE):
        resnet_grid.main(resnet_grid.parse(["--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_the_command_line_sets_grid_and_training():
    config = resnet_grid.parse([])
    assert (config.block_sizes, config.centroids) == ((4, 8, 9, 18), (256, 1024))
    assert config.network.train == resnet.TuneConfig()
    config = resnet_grid.parse(["--block-sizes", "3", "5", "--centroids", "7", "--jobs=8", "--epochs=2", "--seed=3"])
    assert (config.block_sizes, config.centroids, config.jobs) == ((3, 5), (7,), 8)
    assert (config.network.train.epochs, config.network.train.seed, config.network.seed) == (2, 3, 3)


@pytest.mark.parametrize("option", ["--block-sizes", "--centroids", "--jobs"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_counts_are_whole_numbers_of_at_least_one(option, value, capsys):
    with pytest.raises(SystemExit):
        resnet_grid.parse([f"{option}={value}"])
    assert f"{option}: must be a whole number of at least 1, got {value!r}" in capsys.readouterr().err
