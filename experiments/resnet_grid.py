"""What do block size and number of centroids cost in iterative product quantization of a ResNet-20?

Cuts the kernels of a trained ResNet-20 into blocks of 4, 8, 9 and 18 values and gives each layer 256 or 1,024
centroids. Each of the eight networks is tested as the clustering leaves it, quantized layer by layer with training in
between, and quantized all at once and trained for as many steps. Beside them the float network, trained alike.
`JAXVQ_CIFAR10_DIR` says where weights and images are; see `experiments/cifar.py`.

    python -m experiments.resnet_grid [--smoke] [--validate] [--block-sizes N ...] [--centroids N ...] [--jobs N]
        [--epochs N] [--learning-rate X] [--distilled X] [--out DIR] [--seed N]

As in the source, a layer has at most one centroid for four of its vectors, and the blocks of the dense layer are of 4.
The first convolution, 432 weights, has a 4-bit palette everywhere, and so has a layer whose inputs no block divides.

Source: P. Stock, A. Joulin, R. Gribonval, B. Graham and H. Jegou, "And the Bit Goes Down: Revisiting the Quantization
of Neural Networks", 2020, arXiv 1907.05686.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib.axes
import matplotlib.figure
import rich
import rich.box
import rich.console
import rich.progress
import rich.table

import jaxvq
from experiments import cifar, resnet_pq
from experiments.data import DatasetUnavailableError
from experiments.resnet import Progress, ResNet20, Variables, random_variables, stored
from experiments.resnet_pq import BY_LAYER, FLOAT, PLAIN, TUNED, WEIGHED, Result, Study
from jaxvq import KMeans, Product, Rule, Spec

BLOCK_SIZES = (4, 8, 9, 18)
CENTROIDS = (256, 1024)
FIRST = "conv1/kernel"
PALETTE = KMeans(bits=4)
DENSE_BLOCK_SIZE = 4
VECTORS_PER_CENTROID = 4
WITHIN = 3  # points of accuracy below the float network


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      block_sizes: values in one vector of a convolution.
      centroids: of each layer, at most.
      jobs: cells of the grid that are worked on at the same time.
      network: the network, its training, the seed and the folder to write to.
    """

    block_sizes: tuple[int, ...]
    centroids: tuple[int, ...]
    jobs: int
    network: resnet_pq.Config


@dataclasses.dataclass(frozen=True)
class Cell:
    """One block size with one number of centroids, and what came of it.

    Attributes:
      block_size: values in one vector of a convolution.
      centroids: of each layer, before they are clamped.
      spec: a rule for each layer.
      results: by importance without training, layer by layer, all layers at once.
    """

    block_size: int
    centroids: int
    spec: Spec
    results: tuple[Result, ...] = ()

    @property
    def name(self) -> str:
        """Such as "d=9, k=256"."""
        return f"d={self.block_size}, k={self.centroids}"

    def result(self, way: str) -> Result:
        """The result of one way to make it."""
        return next(result for result in self.results if result.way == way)

    def used(self) -> dict[str, int]:
        """How many centroids each layer with vectors has, by path."""
        return {rule.pattern: rule.method.entries for rule in self.spec.rules if isinstance(rule.method, Product)}


def method_of(path: str, shape: Sequence[int], *, block_size: int, centroids: int) -> KMeans | Product:
    """How one layer is quantized: one centroid for four of its vectors at the most, or a 4-bit palette."""
    dim = DENSE_BLOCK_SIZE if len(shape) == 2 else block_size
    if path == FIRST or math.prod(shape[:-1]) % dim:
        return PALETTE
    return Product(k=min(centroids, math.prod(shape) // dim // VECTORS_PER_CENTROID), dim=dim)


def cell_of(params: Any, *, block_size: int, centroids: int) -> Cell:
    """The cell with a rule for each layer."""
    entries = [entry for entry in jaxvq.resolve(params, PALETTE).entries if entry.method is not None]
    sizes = {"block_size": block_size, "centroids": centroids}
    rules = [Rule(entry.path, method_of(entry.path, entry.shape, **sizes)) for entry in entries]
    return Cell(block_size, centroids, Spec(tuple(rules)))


def run_cell(study: Study, cell: Cell, teacher: Variables) -> Cell:
    """The cell with its results."""
    began = time.perf_counter()
    clustered = study.quantized(cell.spec, importance=True)
    results = [study.measure(cell.name, stored(clustered), began, way=WEIGHED)]
    began = time.perf_counter()
    tuned = study.tuned_by_layer(cell.spec, cell.name, teacher=teacher)
    results.append(study.measure(cell.name, stored(tuned), began, way=BY_LAYER))
    began = time.perf_counter()
    tuned = study.tuned(clustered, f"{cell.name}, at once", teacher=teacher, spec=cell.spec)
    results.append(study.measure(cell.name, stored(tuned), began, way=TUNED))
    return dataclasses.replace(cell, results=tuple(results))


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment.

    Returns:
      What it found, also written to `results.json`: the float network, and a cell for each block size and number of
      centroids.

    Raises:
      DatasetUnavailableError: when the data is not to be had.
    """
    study = prepare(config.network)
    out = config.network.out
    out.mkdir(parents=True, exist_ok=True)
    params = study.variables["params"]
    grid = itertools.product(config.block_sizes, config.centroids)
    cells = [cell_of(params, block_size=block_size, centroids=centroids) for block_size, centroids in grid]
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bars:
        study = dataclasses.replace(study, progress=progress_in(bars))
        floats = [study.measure(FLOAT, study.variables, time.perf_counter(), way=PLAIN)]
        began = time.perf_counter()
        teacher = study.tuned(study.variables, FLOAT)
        floats.append(study.measure(FLOAT, teacher, began, way=TUNED))
        # Most of the time goes to compiling, which lets other threads run.
        with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
            done = pool.map(lambda cell: run_cell(study, cell, teacher), cells)
            cells = list(bars.track(done, total=len(cells), description="cells"))
    rich.print(table_of(cells, floats, images=len(study.dataset.test_labels)))
    draw(cells, floats, study=study).savefig(out / "resnet_grid.png", dpi=150)
    found = {
        "dataset": study.dataset.name,
        "test_images": len(study.dataset.test_labels),
        "seed": config.network.seed,
        "jobs": config.jobs,
        "training": dataclasses.asdict(config.network.train),
        "finding": finding(cells, floats[1]),
        "float": [dataclasses.asdict(result) for result in floats],
        "cells": [{**dataclasses.asdict(cell), "spec": json.loads(cell.spec.to_json())} for cell in cells],
    }
    # Through JSON, so that what is returned is what was written.
    text = json.dumps(found, indent=1)
    (out / "results.json").write_text(text + "\n")
    rich.print(f"written to {out}: resnet_grid.png, results.json")
    return json.loads(text)


def prepare(config: resnet_pq.Config) -> Study:
    """The network and the images that the run asks for; a smoke run has a network of one block.

    Raises:
      DatasetUnavailableError: when they are not to be had.
    """
    if not config.smoke:
        return resnet_pq.prepare(config)
    dataset, model = cifar.synthetic(50), ResNet20(widths=(16,), blocks=1)
    return resnet_pq.weighed(config, model, random_variables(model, dataset.train_images), dataset)


def progress_in(bars: rich.progress.Progress) -> Callable[[str], Progress]:
    """Bars for sequences of several threads, each gone at the end of its sequence."""

    def named(text: str) -> Progress:
        def shown(sequence: Sequence[Any]) -> Iterable[Any]:
            task = bars.add_task(text, total=len(sequence))
            for item in sequence:
                yield item
                bars.advance(task)
            bars.remove_task(task)

        return shown

    return named


def finding(cells: Sequence[Cell], tuned: Result) -> str:
    """How small a network stays close to float layer by layer, and which way of training is the better one."""
    results = [cell.result(BY_LAYER) for cell in cells]
    near = [result for result in results if result.accuracy >= tuned.accuracy - WITHIN / 100]
    if near:
        least = min(near, key=lambda result: result.bits_per_weight)
        first = f"within {WITHIN} points of float at {least.bits_per_weight:.2f} bits per weight ({least.name})"
    else:
        best = max(results, key=lambda result: result.accuracy)
        loss = 100 * (tuned.accuracy - best.accuracy)
        first = f"{loss:.1f} points below float at best, at {best.bits_per_weight:.2f} bits per weight ({best.name})"
    better = sum(cell.result(BY_LAYER).accuracy > cell.result(TUNED).accuracy for cell in cells)
    return f"{first}; layer by layer beats all at once in {better} of {len(cells)} cells"


def table_of(cells: Sequence[Cell], floats: Sequence[Result], *, images: int) -> rich.table.Table:
    """A row for each cell."""
    plain, tuned = (result.accuracy for result in floats)
    error = 100 * math.sqrt(tuned * (1 - tuned) / images)
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="d: values in a vector; k: centroids of a layer, at most a quarter of its vectors; used: what that "
        "leaves in the three stages and the dense layer. Bits per weight of the whole network, everything counted: "
        "codes, int8 codebooks and their scales, normalization and bias in float16, checksums; of the kernels alone "
        f"beside it. Then percent of the {images:,} test images (one standard error: {error:.1f} points): clustered by "
        "importance, trained layer by layer (one residual block after the other), trained all at once; loss: of layer "
        "by layer, in points, against the float network trained alike. "
        f"Float: {100 * plain:.2f}%, trained {100 * tuned:.2f}%.",
        caption_justify="left",
    )
    for heading in ("d", "k", "used", "bits", "kernels", "clustered", "by layer", "at once", "loss"):
        table.add_column(heading, justify="left" if heading == "used" else "right")
    for cell in cells:
        result = cell.result(BY_LAYER)
        table.add_row(
            str(cell.block_size),
            str(cell.centroids),
            used_by_stage(cell),
            f"{result.bits_per_weight:.2f}",
            f"{result.kernel_bits:.2f}",
            *(f"{100 * cell.result(way).accuracy:.2f}" for way in (WEIGHED, BY_LAYER, TUNED)),
            f"{100 * (tuned - result.accuracy):.2f}",
        )
    return table


def used_by_stage(cell: Cell) -> str:
    """The centroids of the three stages and of the dense layer: "32, 64-128, 256-512, 40"."""
    stages: dict[str, list[int]] = {}
    for path, count in cell.used().items():
        stages.setdefault(path.split("/")[0].split("_")[0], []).append(count)
    return ", ".join(
        "-".join(str(count) for count in sorted({min(counts), max(counts)})) for _, counts in sorted(stages.items())
    )


def draw(cells: Sequence[Cell], floats: Sequence[Result], *, study: Study) -> matplotlib.figure.Figure:
    """Accuracy against bits per weight: as clustered, and after training in both ways."""
    figure = matplotlib.figure.Figure(figsize=(12, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    plot(left, cells, {WEIGHED: ("^", "clustered by importance")}, label_way=WEIGHED)
    left.axhline(100 * floats[0].accuracy, color="black", linestyle="--", linewidth=1, label="float")
    left.set_title("not trained", fontsize="medium")
    ways = {BY_LAYER: ("s", "codebooks trained layer by layer"), TUNED: ("o", "codebooks trained all layers at once")}
    plot(right, cells, ways, label_way=BY_LAYER)
    resnet_pq.draw_floats(right, floats)
    right.set_title("trained for as many steps", fontsize="medium")
    for axes in (left, right):
        axes.set_xlabel("bits per weight of the whole network, everything counted")
        axes.margins(x=0.2 if axes is left else 0.15, y=0.1)
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize="small")
    left.set_ylabel(f"accuracy on {len(study.dataset.test_labels):,} images, %")
    first, second = finding(cells, floats[1]).split("; ")
    figure.suptitle(f"ResNet-20, {study.dataset.name}, iterative product quantization: {first};\n{second}")
    figure.supxlabel(
        "9 x 256: vectors of d=9 values, k=256 centroids for a layer, at most a quarter of its vectors. "
        "First convolution: 4-bit palette; dense layer: d=4. Grey band: three points below the trained float network.\n"
        "Layer by layer: one residual block after the other. "
        "Bits count codes, int8 codebooks and scales, normalization and checksums.",
        fontsize="small",
    )
    return figure


def plot(
    axes: matplotlib.axes.Axes, cells: Sequence[Cell], ways: dict[str, tuple[str, str]], *, label_way: str
) -> None:
    """A marker for each way and cell, a colour for each block size; cells are named at `label_way`."""
    sizes = list(dict.fromkeys(cell.block_size for cell in cells))
    for marker, label in ways.values():
        axes.plot([], [], marker, color="0.4", label=label)
    for cell in cells:
        number = sizes.index(cell.block_size)
        bits, colour = cell.result(label_way).bits_per_weight, f"C{number}"
        heights = {way: 100 * cell.result(way).accuracy for way in ways}
        axes.vlines(bits, min(heights.values()), max(heights.values()), color=colour, linewidth=1, alpha=0.5)
        for way, (marker, _) in ways.items():
            axes.plot(bits, heights[way], marker, color=colour, alpha=0.8)
        # Cells of neighbouring block sizes come to about the same bits: their names go to different sides.
        offset, side = (((8, -4), "left"), ((8, -4), "left"), ((-6, -14), "right"), ((-8, 0), "right"))[number % 4]
        axes.annotate(
            f"{cell.block_size} x {cell.centroids}",
            (bits, heights[label_way]),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            fontsize="small",
            color=colour,
        )


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.resnet_grid", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument("--block-sizes", nargs="+", type=positive, metavar="N", help="values in a vector")
    parser.add_argument("--centroids", nargs="+", type=positive, metavar="N", help="of each layer, at most")
    parser.add_argument("--jobs", type=positive, default=2, help="cells at the same time; memory for each")
    resnet_pq.add_arguments(parser, out="runs/resnet_grid")
    given = parser.parse_args(arguments)
    return Config(
        block_sizes=tuple(given.block_sizes or (BLOCK_SIZES[2:3] if given.smoke else BLOCK_SIZES)),
        centroids=tuple(given.centroids or (CENTROIDS[:1] if given.smoke else CENTROIDS)),
        jobs=given.jobs,
        network=resnet_pq.configure(given, recipes=(), by_layer=True),
    )


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
      argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except DatasetUnavailableError as unavailable:
        sys.exit(f"error: {unavailable}")
