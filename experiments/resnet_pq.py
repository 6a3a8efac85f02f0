"""How few bits per weight does a ResNet-20 need, before and after its codebooks are fine-tuned?

Quantizes a trained ResNet-20 without training, at 4 bits in palettes per channel, and at no more than 2.5 bits per
weight, where its codebooks then learn on 5,000 images, all at once or layer by layer. Beside it the float network,
fine-tuned in the same way. `JAXVQ_CIFAR10_DIR` says where weights and images are; see `experiments/cifar.py`.

    python -m experiments.resnet_pq [--smoke] [--validate] [--recipes NAME ...] [--no-by-layer] [--from-tuned]
        [--epochs N] [--learning-rate X] [--distilled X] [--out DIR] [--seed N]
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.axes
import matplotlib.figure
import rich
import rich.box
import rich.console
import rich.progress
import rich.table

import jaxvq
from experiments import cifar, resnet
from experiments.data import Dataset, DatasetUnavailableError
from experiments.resnet import ResNet20, TuneConfig, Variables, stored, tune
from experiments.train import accuracy
from jaxvq import KMeans, LayerStats, Product, Residual, Rule, Spec

CALIBRATION = 1_000  # training images that tell how much each weight matters
LIMIT = 2.5  # bits per weight, over the whole network
FLOAT = "float"
PLAIN, WEIGHED, TUNED, BY_LAYER = "clustered", "by importance", "fine-tuned", "layer by layer"


def on_stages(first: Any, second: Any, third: Any) -> Spec:
    """One method for the convolutions of each stage: 13,824, 50,688 and 202,752 weights; 4-bit palettes elsewhere."""
    methods = (first, second, third)
    rules = (Rule(f"layer{stage}_./.*kernel", method) for stage, method in enumerate(methods, start=1))
    return Spec(rules=tuple(rules), default=KMeans(bits=4))


FOUR_BITS = "4-bit palettes"
RECIPES = {
    FOUR_BITS: Spec(default=KMeans(bits=4, per="channel")),
    "palettes": on_stages(*[KMeans(bits=2, per="channel")] * 3),
    "product-3": on_stages(Product(k=16, dim=2), Product(k=64, dim=3), Product(k=64, dim=3)),
    "product-4": on_stages(KMeans(bits=4), Product(k=64, dim=2), Product(k=128, dim=4)),
    "product-9": on_stages(KMeans(bits=4), Product(k=64, dim=2), Product(k=256, dim=9)),
    "residual": on_stages(KMeans(bits=4), Product(k=32, dim=2), Residual(stages=2, k=16, dim=4)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      recipes: names of `RECIPES` to fine-tune.
      by_layer: fine-tune them layer by layer, too.
      train: of the float network and of the quantized ones.
      calibration: training images that tell how much each weight matters.
      validate: test on a fifth of the training images, which is then not trained on: to choose settings.
      smoke: a small network of random weights and images of noise.
      out: the folder to write to.
      seed: of the clustering and of the training.
    """

    recipes: tuple[str, ...]
    by_layer: bool
    train: TuneConfig
    calibration: int
    validate: bool
    smoke: bool
    out: pathlib.Path
    seed: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What one variant of the network came to.

    Attributes:
      name: the method or the recipe.
      way: "clustered", or "by importance", each value weighed by how much it matters; that "fine-tuned", all layers at
        once or "layer by layer". Float weights are not clustered.
      bits_per_weight: over the whole network, everything counted.
      kernel_bits: over the kernels of the convolutions and the dense layer, their codebooks included.
      nbytes: bytes of everything that is stored, but for the file's header.
      accuracy: fraction of the test images.
      seconds: that making it took.
    """

    name: str
    way: str
    bits_per_weight: float
    kernel_bits: float
    nbytes: int
    accuracy: float
    seconds: float


def track(text: str) -> resnet.Progress:
    """A bar of its own for each sequence."""
    return functools.partial(rich.progress.track, description=text, console=rich.console.Console(stderr=True))


@dataclasses.dataclass(frozen=True)
class Study:
    """The network, the images, what weighs its weights, and how progress under a name is shown."""

    config: Config
    model: ResNet20
    variables: Variables
    dataset: Dataset
    stats: Mapping[str, LayerStats]
    progress: Callable[[str], resnet.Progress] = track

    def measure(self, name: str, variables: Variables, began: float, *, way: str) -> Result:
        """The figures of one variant."""
        seconds = time.perf_counter() - began
        figures = jaxvq.report(None, variables)
        kernels = [leaf for leaf in figures.leaves if leaf.path.endswith("kernel")]
        return Result(
            name,
            way,
            bits_per_weight=figures.bits_per_weight,
            kernel_bits=8 * sum(leaf.nbytes for leaf in kernels) / sum(math.prod(leaf.shape) for leaf in kernels),
            nbytes=figures.nbytes,
            accuracy=self.accuracy(variables),
            seconds=seconds,
        )

    def accuracy(self, variables: Variables) -> float:
        """The fraction of test images that a network gets right, computed in float32 whatever it is stored in."""
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), jaxvq.dequantize_params(variables))
        return accuracy(self.model, exact, self.dataset)

    def quantized(self, spec: Spec, *, importance: bool) -> Variables:
        """The network as `spec` says, not trained."""
        stats = self.stats if importance else None
        key = jax.random.key(self.config.seed)
        return {**self.variables, "params": jaxvq.quantize_params(self.variables["params"], spec, key=key, stats=stats)}

    def tuned(
        self, variables: Variables, text: str, *, teacher: Variables | None = None, spec: Spec | None = None
    ) -> Variables:
        """A network, float or quantized, trained on; with `spec` by the program that `tuned_by_layer` takes."""
        config, progress = dataclasses.replace(self.config.train, spec=spec), self.progress(text)
        return tune(self.model, variables, self.dataset, config, teacher=teacher, progress=progress)

    def tuned_by_layer(self, spec: Spec, text: str, *, teacher: Variables) -> Variables:
        """The network quantized block by block from the input on, what came before and after trained in between.

        As many steps as `tuned` takes: half between the blocks, half when all are quantized.

        Source: P. Stock, A. Joulin, R. Gribonval, B. Graham and H. Jegou, "And the Bit Goes Down: Revisiting the
        Quantization of Neural Networks", 2020, arXiv 1907.05686.
        """
        blocks: dict[str, list[Rule]] = {}
        for entry in jaxvq.resolve(self.variables["params"], spec).entries:
            if entry.method is not None:
                rules = blocks.setdefault(entry.path.split("/")[0], [])
                rules.append(Rule(re.escape(entry.path), entry.method))
        config, variables = self.config.train, self.variables
        for number, (block, rules) in enumerate(sorted(blocks.items())):
            picked = {path: stats for path, stats in self.stats.items() if path.split("/")[0] == block}
            key = jax.random.key(self.config.seed)
            params = jaxvq.quantize_params(variables["params"], rules, key=key, stats=picked)
            last = number == len(blocks) - 1
            epochs = config.epochs / 2 if last else config.epochs / 2 / (len(blocks) - 1)
            part = dataclasses.replace(config, epochs=epochs, seed=config.seed + number, spec=spec)
            variables, progress = {**variables, "params": params}, self.progress(f"{text}, {block}")
            variables = tune(self.model, variables, self.dataset, part, teacher=teacher, progress=progress)
        return variables


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment.

    Returns:
      What it found, also written to `results.json`: a row for each variant, and the file of the first recipe.

    Raises:
      DatasetUnavailableError: when the data is not to be had.
      RuntimeError: when the network loaded from the file has another accuracy than the one that was saved.
    """
    study = prepare(config)
    config.out.mkdir(parents=True, exist_ok=True)
    results = [study.measure(FLOAT, study.variables, time.perf_counter(), way=PLAIN)]
    results += without_training(study)
    began = time.perf_counter()
    teacher = study.tuned(study.variables, FLOAT)
    results.append(study.measure(FLOAT, teacher, began, way=TUNED))
    kept: dict[int, Variables] = {}
    for name in config.recipes:
        began = time.perf_counter()
        variables = study.quantized(RECIPES[name], importance=True)
        kept[len(results)] = stored(study.tuned(variables, name, teacher=teacher))
        results.append(study.measure(name, kept[len(results)], began, way=TUNED))
        if config.by_layer:
            began = time.perf_counter()
            kept[len(results)] = stored(study.tuned_by_layer(RECIPES[name], name, teacher=teacher))
            results.append(study.measure(name, kept[len(results)], began, way=BY_LAYER))
    chosen = min(kept)  # the first recipe: test images choose nothing
    rich.print(_table(results, chosen, images=len(study.dataset.test_labels)))
    draw(results, chosen, dataset=study.dataset).savefig(config.out / "resnet_pq.png", dpi=150)
    found = {
        "dataset": study.dataset.name,
        "test_images": len(study.dataset.test_labels),
        "seed": config.seed,
        "training": dataclasses.asdict(config.train),
        "recipes": {name: json.loads(RECIPES[name].to_json()) for name in config.recipes},
        "results": [dataclasses.asdict(result) for result in results],
        "chosen": {**dataclasses.asdict(results[chosen]), **keep(study, kept[chosen], results[chosen])},
    }
    (config.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    rich.print(f"written to {config.out}: resnet_pq.png, results.json, {found['chosen']['file']}")
    return found


def prepare(config: Config) -> Study:
    """The network and the images that the run asks for.

    Raises:
      DatasetUnavailableError: when they are not to be had.
    """
    if config.smoke:
        dataset, model = cifar.synthetic(50), ResNet20(widths=(16, 16, 16), blocks=1)
        variables = resnet.random_variables(model, dataset.train_images)
    else:
        dataset, model, variables = cifar.cifar10(), ResNet20(), resnet.from_torch(cifar.weights())
    if config.validate:
        dataset = cifar.held_out(dataset)
    return weighed(config, model, variables, dataset)


def weighed(config: Config, model: ResNet20, variables: Variables, dataset: Dataset) -> Study:
    """The study of a network, with how much each of its weights matters."""
    stats = resnet.sensitivity(model, variables, dataset, count=config.calibration, progress=track("sensitivity"))
    return Study(config, model, variables, dataset, stats)


def without_training(study: Study) -> list[Result]:
    """Palettes per channel, and the recipes: as the clustering leaves them."""
    smoke = study.config.smoke
    recipes = study.config.recipes
    names, ways = (recipes, (WEIGHED,)) if smoke else ((FOUR_BITS, *recipes), (PLAIN, WEIGHED))
    results = []
    for name, way in study.progress("without training")([(name, way) for name in names for way in ways]):
        began = time.perf_counter()
        variables = stored(study.quantized(RECIPES[name], importance=way == WEIGHED))
        results.append(study.measure(name, variables, began, way=way))
    return results


def keep(study: Study, variables: Variables, result: Result) -> dict[str, Any]:
    """Saves a network, loads it from the file and tests what was loaded."""
    path = study.config.out / "model.safetensors"
    jaxvq.save(path, variables, metadata={"recipe": result.name, "way": result.way}, force=True)
    loaded = study.accuracy(jaxvq.load(path))
    if loaded != result.accuracy:
        raise RuntimeError(
            f"{path}: the loaded network's accuracy is {loaded!r}, before saving it was {result.accuracy!r}"
        )
    return {"file": path.name, "file_nbytes": path.stat().st_size, "accuracy_loaded": loaded}


def _table(results: Sequence[Result], chosen: int, *, images: int) -> rich.table.Table:
    error = math.sqrt(results[0].accuracy * (1 - results[0].accuracy) / images)
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="Bits per weight of the whole network, everything counted: codes, int8 codebooks and their scales, "
        "normalization and bias in float16, checksums; of the kernels alone beside it. Right: percent of the "
        f"{images:,} test images (one standard error: {100 * error:.1f} points); loss: in points, against the float "
        "network trained alike. By importance: values weigh as much in the clustering as their mean squared gradient.",
        caption_justify="left",
    )
    for heading in ("weights", "how"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bits", "kernels", "right", "loss", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, result in enumerate(results):
        table.add_row(
            result.name,
            "" if result == results[0] else result.way,
            f"{result.bits_per_weight:.2f}",
            f"{result.kernel_bits:.2f}",
            f"{100 * result.accuracy:.2f}",
            f"{100 * (_float_accuracy(result, results) - result.accuracy):.2f}",
            f"{result.seconds:.0f}",
            style="bold green" if number == chosen else None,
            end_section=result.name == FLOAT,
        )
    return table


def _float_accuracy(result: Result, results: Sequence[Result]) -> float:
    """The accuracy of the float network that had the training of `result`."""
    way = PLAIN if result.way in (PLAIN, WEIGHED) else TUNED
    return next(other.accuracy for other in results if (other.name, other.way) == (FLOAT, way))


def draw(results: Sequence[Result], chosen: int, *, dataset: Dataset) -> matplotlib.figure.Figure:
    """Accuracy against bits per weight, and the two float networks as lines."""
    figure = matplotlib.figure.Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    made, tuned = results[chosen], 100 * _float_accuracy(results[chosen], results)
    draw_floats(axes, [result for result in results if result.name == FLOAT])
    axes.axvline(LIMIT, color="tab:gray", linestyle=":", linewidth=1)
    quantized = [result for result in results if result.name != FLOAT]
    styles = {
        PLAIN: ("v", "tab:gray", "clustered, not trained"),
        WEIGHED: ("^", "tab:blue", "clustered by importance, not trained"),
        TUNED: ("o", "tab:green", "codebooks fine-tuned, all layers at once"),
        BY_LAYER: ("s", "tab:orange", "codebooks fine-tuned, layer by layer"),
    }
    for way, (marker, colour, label) in styles.items():
        points = [result for result in quantized if result.way == way]
        where = [result.bits_per_weight for result in points], [100 * result.accuracy for result in points]
        axes.plot(*where, marker, color=colour, label=label, linestyle="none", markersize=8, alpha=0.8)
    for name in dict.fromkeys(result.name for result in quantized):
        points = [result for result in quantized if result.name == name]
        low = min(points, key=lambda result: result.accuracy)
        at = low.bits_per_weight, 100 * low.accuracy
        axes.annotate(name, at, xytext=(0, -14), textcoords="offset points", ha="center", fontsize="small")
        axes.vlines(low.bits_per_weight, at[1], 100 * max(point.accuracy for point in points), color="0.8", zorder=0)
    axes.set_xlabel("bits per weight of the whole network, everything counted")
    axes.set_ylabel(f"accuracy on {len(dataset.test_labels):,} images, %")
    axes.set_title(
        f"ResNet-20, {dataset.name}: {made.name} at {made.bits_per_weight:.2f} bits per weight "
        f"{100 * made.accuracy:.2f}%, float {tuned:.2f}%"
    )
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.supxlabel(
        f"Grey band: three points below the fine-tuned float network. Dotted: {LIMIT} bits. "
        "Bits count codes, codebooks, scales, normalization and checksums.",
        fontsize="small",
    )
    return figure


def draw_floats(axes: matplotlib.axes.Axes, results: Sequence[Result]) -> None:
    """The float network before and after its training, and a band of three points below."""
    for result, dashes in zip(results, ("--", "-"), strict=True):
        label = f"float{', fine-tuned' if result.way == TUNED else ''}: {100 * result.accuracy:.2f}%"
        axes.axhline(100 * result.accuracy, color="black", linestyle=dashes, linewidth=1, label=label)
    axes.axhspan(100 * results[-1].accuracy - 3, 100 * results[-1].accuracy, color="black", alpha=0.08, linewidth=0)


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.resnet_pq", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that everything works")
    names = tuple(name for name in RECIPES if name != FOUR_BITS)
    parser.add_argument("--recipes", nargs="+", choices=names, default=["residual"], help="to fine-tune")
    parser.add_argument("--by-layer", action=argparse.BooleanOptionalAction, default=True, help="do that as well")
    add_arguments(parser, out="runs/resnet_pq")
    given = parser.parse_args(arguments)
    return configure(given, recipes=tuple(given.recipes), by_layer=given.by_layer and not given.smoke)


def add_arguments(parser: argparse.ArgumentParser, *, out: str) -> None:
    """The options of every run with this network, but for `--smoke`."""
    parser.add_argument("--validate", action="store_true", help="test on training images held out, to choose settings")
    parser.add_argument("--epochs", type=float, default=TuneConfig.epochs)
    parser.add_argument("--learning-rate", type=float, default=TuneConfig.learning_rate)
    parser.add_argument("--distilled", type=float, default=TuneConfig.distilled, help="share of the teacher")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)


def configure(given: argparse.Namespace, *, recipes: tuple[str, ...], by_layer: bool) -> Config:
    """The configuration with the options of `add_arguments` and `--smoke`."""
    train = TuneConfig(given.epochs, TuneConfig.batch_size, given.learning_rate, given.distilled, given.seed)
    if given.smoke:
        train = dataclasses.replace(train, epochs=1, batch_size=10)
    calibration = 25 if given.smoke else CALIBRATION
    return Config(recipes, by_layer, train, calibration, given.validate, given.smoke, given.out, given.seed)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except DatasetUnavailableError as unavailable:
        sys.exit(f"error: {unavailable}")
