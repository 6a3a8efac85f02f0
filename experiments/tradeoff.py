"""How small does a trained network get before it loses one point of accuracy?

Trains a small convolutional network, quantizes it with every method at several rates, tests each variant, and writes
a table, a figure and the smallest model within one point of the float accuracy, which it loads back and tests again.

    python -m experiments.tradeoff [--dataset digits|mnist] [--smoke] [--out DIR] [--seed N]
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import rich
import rich.box
import rich.console
import rich.progress
import rich.table
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

import jaxvq
from experiments.data import Dataset, DatasetUnavailableError, load
from experiments.train import ConvNet, TrainConfig, Variables, accuracy, fit, network
from jaxvq import KMeans, Product, Residual, RowVQ, Rule, Spec, Symmetric, Uniform
from jaxvq.metrics import report

HIDDEN = "params/Dense_0/kernel"  # the layer that holds most of the weights
FILTERS = "params/Conv_[12]/kernel"  # the 3x3 convolutions
REST = KMeans(bits=4)
AT_ONCE = 2  # variants; most of their time is compilation, each on one core
CEILING = 101  # percent; keeps an accuracy of 100 on the stretched axis


@dataclasses.dataclass(frozen=True)
class Point:
    """One way to quantize the network.

    Attributes:
      family: the method, as one line of the figure.
      rate: its setting, such as "3 bits".
      spec: what to do with which layer.
    """

    family: str
    rate: str
    spec: Spec


FLOAT = Point("float", "32 bits", Spec())


@dataclasses.dataclass(frozen=True)
class Result:
    """What one way to quantize the network came to.

    Attributes:
      family: the method.
      rate: its setting.
      bits_per_weight: over the whole network, with everything counted.
      nbytes: bytes of everything that is stored, but for the file's header.
      ratio: how many times smaller than the float network.
      sqnr_db: signal to quantization noise of the weights; None where nothing was changed.
      accuracy: fraction of the test images.
    """

    family: str
    rate: str
    bits_per_weight: float
    nbytes: int
    ratio: float
    sqnr_db: float | None
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      dataset: "digits" or "mnist".
      train: the network and its training.
      points: the ways to quantize it.
      tolerance: how much accuracy the chosen model may lose.
      out: the folder to write to.
      seed: of the clustering.
    """

    dataset: str
    train: TrainConfig
    points: tuple[Point, ...]
    tolerance: float
    out: pathlib.Path
    seed: int

    @classmethod
    def of(cls, *, dataset: str, smoke: bool, out: pathlib.Path, seed: int) -> "Config":
        """The run that the command line asks for; `smoke` is one method of each kind on a barely trained network."""
        train = TrainConfig(seed=seed)
        if smoke:
            train = TrainConfig(channels=(4, 4, 4), hidden=16, epochs=10, seed=seed)
        elif dataset == "mnist":
            train = TrainConfig(epochs=2, batch_size=128, seed=seed)
        return cls(dataset, train, smoke_points() if smoke else all_points(), 0.01, out, seed)


def all_points() -> tuple[Point, ...]:
    """Every method at several rates; the float network comes first."""
    points = [FLOAT]
    points += [on_all("Uniform, tensor", Uniform(bits=bits)) for bits in (2, 3, 4, 8)]
    points += [on_all("Uniform, channel", Uniform(bits=bits, per="channel")) for bits in (2, 3, 4)]
    points += [on_all("Symmetric, tensor", Symmetric(bits=bits)) for bits in (3, 4, 8)]
    points += [on_all("Symmetric, channel", Symmetric(bits=bits, per="channel")) for bits in (2, 3, 4)]
    points += [on_all("KMeans, tensor", KMeans(bits=bits)) for bits in (2, 3, 4)]
    for dtype, detail in (("float32", ""), ("int8", ", int8")):
        palettes = [KMeans(bits=bits, per="channel", codebook_dtype=dtype) for bits in (2, 3)]
        points += [on_all(f"KMeans, channel{detail}", method) for method in palettes]
    points += [on_hidden("Product, d=2", f"k = {k}", Product(k=k, dim=2)) for k in (16, 64)]
    points += [on_hidden("Product, d=4", f"k = {k}", Product(k=k, dim=4)) for k in (16, 64, 256)]
    short = [Product(k=k, dim=4, codebook_dtype="bfloat16") for k in (64, 256)]
    points += [on_hidden("Product, d=4, bf16", f"k = {method.k}", method) for method in short]
    for k in (64, 256):
        rules = (Rule(HIDDEN, Product(k=k, dim=9)), Rule(FILTERS, Product(k=128, dim=9)))
        points.append(Point("Product, d=9", f"k = {k}", Spec(rules=rules, default=REST)))
    points += [on_hidden("RowVQ", f"{part:.0%} of rows", RowVQ(fraction=part)) for part in (0.1, 0.3, 0.6)]
    sums = [Residual(stages=2, k=k, dim=8) for k in (16, 64)]
    points += [on_hidden("Residual, d=8", f"k = {method.k} + {method.k}", method) for method in sums]
    return tuple(points)


def smoke_points() -> tuple[Point, ...]:
    """Every method once."""
    return (
        FLOAT,
        on_all("Uniform, tensor", Uniform(bits=8)),
        on_all("Symmetric, tensor", Symmetric(bits=4)),
        on_all("KMeans, tensor", KMeans(bits=4)),
        on_hidden("Product, d=4", "k = 16", Product(bits=4, dim=4)),
        on_hidden("RowVQ", "30% of rows", RowVQ(fraction=0.3)),
        on_hidden("Residual, d=8", "k = 16 + 16", Residual(stages=2, bits=4, dim=8)),
    )


def on_all(family: str, method: Any) -> Point:
    """A method of single values on every weight."""
    return Point(family, f"{method.bits} bits", Spec(default=method))


def on_hidden(family: str, rate: str, method: Any) -> Point:
    """A method of vectors on the hidden layer; the other layers are too small for a codebook of vectors."""
    return Point(family, rate, Spec(rules=(Rule(HIDDEN, method),), default=REST))


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment.

    Returns:
      What it found, also written to `results.json`: a row for each variant, and the chosen one with its accuracy
      before it was saved and after it was loaded.

    Raises:
      DatasetUnavailableError: when the data is not to be had.
      RuntimeError: when the model loaded from the file has another accuracy than the one that was saved.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    dataset = load(config.dataset)
    variables = fit(dataset, config.train, progress=_progress("training  "))
    model = network(config.train, dataset)
    variant = functools.partial(measure, variables=variables, model=model, dataset=dataset, seed=config.seed)
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        waiting = [pool.submit(variant, point) for point in config.points]
        results = [one.result() for one in _progress("quantizing")(waiting)]
    finally:
        pool.shutdown(cancel_futures=True)  # an error or an interrupt does not wait for the rest
    chosen = choose(results, tolerance=config.tolerance)
    exact = results[0].accuracy
    error = math.sqrt(exact * (1 - exact) / len(dataset.test_labels))
    rich.print(_table(results, chosen, images=len(dataset.test_labels), error=error))
    figure = draw(results, chosen, config=config, error=error)
    figure.savefig(config.out / "tradeoff.png", dpi=150)
    stored = keep(config.points[chosen], results[chosen], variables, model=model, dataset=dataset, config=config)
    found = {
        "dataset": config.dataset,
        "seed": config.seed,
        "test_images": len(dataset.test_labels),
        "standard_error": error,
        "variants": [dataclasses.asdict(result) for result in results],
        "chosen": stored,
    }
    (config.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    rich.print(f"written to {config.out}: tradeoff.png, results.json, {stored['file']}")
    return found


def measure(point: Point, variables: Variables, *, model: ConvNet, dataset: Dataset, seed: int) -> Result:
    """Size, error and accuracy of one variant."""
    quantized = jaxvq.quantize_params(variables, point.spec, key=jax.random.key(seed))
    figures = report(variables, quantized)
    decibels = figures.sqnr_db
    return Result(
        point.family,
        point.rate,
        bits_per_weight=figures.bits_per_weight,
        nbytes=figures.nbytes,
        ratio=figures.ratio,
        sqnr_db=decibels if decibels is not None and math.isfinite(decibels) else None,
        accuracy=accuracy(model, jaxvq.dequantize_params(quantized), dataset),
    )


def choose(results: Sequence[Result], *, tolerance: float) -> int:
    """The number of the smallest variant that is at most `tolerance` less accurate than the first, the float one."""
    least = results[0].accuracy - tolerance - 1e-9  # a loss of exactly `tolerance` must not fail by rounding
    allowed = [i for i, result in enumerate(results) if result.accuracy >= least]
    return min(allowed, key=lambda i: (results[i].nbytes, -results[i].accuracy))


def keep(
    point: Point, result: Result, variables: Variables, *, model: ConvNet, dataset: Dataset, config: Config
) -> dict[str, Any]:
    """Saves the chosen model, loads it from the file and tests what was loaded."""
    path = config.out / "model.safetensors"
    quantized = jaxvq.quantize_params(variables, point.spec, key=jax.random.key(config.seed))
    jaxvq.save(path, quantized, metadata={"dataset": config.dataset}, force=True)
    loaded = accuracy(model, jaxvq.dequantize_params(jaxvq.load(path)), dataset)
    if loaded != result.accuracy:
        raise RuntimeError(
            f"{path}: the loaded model's accuracy is {loaded!r}, before saving it was {result.accuracy!r}"
        )
    file_nbytes = path.stat().st_size
    rich.print(
        f"chosen: {result.family}, {result.rate}: {path.name} has {file_nbytes:,} bytes, of which "
        f"{file_nbytes - result.nbytes:,} are the header.\n"
        f"accuracy before saving {result.accuracy!r}\naccuracy from the file {loaded!r}, the same"
    )
    return {
        "family": point.family,
        "rate": point.rate,
        "spec": point.spec.to_json(),
        "file": path.name,
        "file_nbytes": file_nbytes,
        "accuracy_before": result.accuracy,
        "accuracy_loaded": loaded,
    }


def _progress(text: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    console = rich.console.Console(stderr=True)
    return functools.partial(rich.progress.track, description=text, console=console)


def _table(results: Sequence[Result], chosen: int, *, images: int, error: float) -> rich.table.Table:
    exact = results[0]
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="Bits per weight and kB are of the whole network, everything counted: codes, codebooks, scales, "
        "padding, biases and statistics; SQNR in dB; right: percent of the test images. "
        f"With {images} images one standard error is {100 * error:.1f} points: smaller differences are noise. "
        "Methods of vectors work on the hidden layer; the other layers then have 4-bit KMeans.",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("rate", no_wrap=True)
    for heading in ("bits", "kB", "ratio", "SQNR", "right", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, result in enumerate(results):
        table.add_row(
            result.family,
            result.rate,
            f"{result.bits_per_weight:.2f}",
            f"{result.nbytes / 1000:.1f}",
            f"{result.ratio:.1f}",
            "-" if result.sqnr_db is None else f"{result.sqnr_db:.1f}",
            f"{100 * result.accuracy:.2f}",
            f"{100 * (result.accuracy - exact.accuracy):+.3f}",
            style="bold green" if number == chosen else None,
            end_section=number == 0,
        )
    return table


def draw(results: Sequence[Result], chosen: int, *, config: Config, error: float) -> matplotlib.figure.Figure:
    """Accuracy against size: one line for each method, the chosen variant marked."""
    exact, best = results[0], results[chosen]
    figure = matplotlib.figure.Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(100 * exact.accuracy, color="black", linewidth=1)
    least = 100 * (exact.accuracy - config.tolerance)
    axes.axhspan(least, 100 * exact.accuracy, color="black", alpha=0.08, linewidth=0)
    families = list(dict.fromkeys(result.family for result in results))
    for family in families:
        line = sorted((result for result in results if result.family == family), key=lambda result: result.nbytes)
        colour, marker, dashes = _style(family)
        axes.plot(
            [result.nbytes / 1000 for result in line],
            [100 * result.accuracy for result in line],
            label=family,
            color=colour,
            marker=marker,
            linestyle=dashes,
            markersize=6,
        )
    _scale(axes)
    axes.annotate(
        f"smallest within one point:\n{best.family}, {best.rate}\n{best.nbytes / 1000:.1f} kB, "
        f"{100 * best.accuracy:.2f}%",
        (best.nbytes / 1000, 100 * best.accuracy),
        xytext=(0.02, 0.88),
        textcoords="axes fraction",
        arrowprops={"arrowstyle": "->", "shrinkB": 6},
    )
    axes.set_xlabel("size of the whole network, kB (1 kB = 1,000 bytes; log scale)")
    axes.set_ylabel("test accuracy, % (stretched towards 100)")
    axes.set_title(
        f"{config.dataset}: {best.family}, {best.rate}: {best.ratio:.1f} times smaller, accuracy "
        f"{100 * exact.accuracy:.1f}% before and {100 * best.accuracy:.1f}% after"
    )
    figure.legend(loc="outside right center", frameon=False)
    figure.supxlabel(
        f"Line: float accuracy, {100 * exact.accuracy:.2f}%. Grey band: one point below it. "
        f"One standard error: {100 * error:.1f} points.",
        fontsize="small",
    )
    return figure


def _style(family: str) -> tuple[str, str, str]:
    """Colour by method; marker and dashes by what shares a codebook or how long the vectors are."""
    method, _, detail = family.partition(", ")
    methods = ("float", "Uniform", "Symmetric", "KMeans", "Product", "RowVQ", "Residual")
    colours = ("black", "tab:blue", "tab:cyan", "tab:red", "tab:green", "tab:brown", "tab:purple")
    details = ("", "tensor", "channel", "channel, int8", "d=2", "d=4", "d=4, bf16", "d=9", "d=8")
    markers = ("*", "o", "s", "D", "^", "v", "<", ">", "P")
    dashes = ("-", "-", "--", ":", "-", "--", ":", "-.", "-")
    kind = details.index(detail)
    return colours[methods.index(method)], markers[kind], dashes[kind]


def _scale(axes: Axes) -> None:
    """Sizes on a log scale; accuracies so that 90, 97 and 99 percent lie well apart."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("function", functions=(_stretch, lambda t: CEILING - np.exp(-t)))
    axes.set_yticks([10, 50, 80, 90, 95, 97, 98, 99, 100])
    axes.set_ylim(top=min(100, axes.get_ylim()[1] + 0.5))
    axes.grid(alpha=0.3)


def _stretch(percent: Any) -> Any:
    return -np.log(np.maximum(CEILING - percent, 1e-3))


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tradeoff", description=__doc__)
    parser.add_argument("--dataset", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/tradeoff"), help="the folder to write to"
    )
    parser.add_argument("--seed", type=int, default=0)
    return Config.of(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except DatasetUnavailableError as unavailable:
        sys.exit(f"error: {unavailable}")
