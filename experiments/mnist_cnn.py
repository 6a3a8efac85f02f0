"""How few values can the weights of a convolutional network have?

Trains a small network, rounds its weights to 8 bits and its biases to one, then trains another and gives each of its
tensors 8 values found by k-means. Beyond the source: 8, 4 and 2 values, trained on with the values shared and with
every weight free, and quantized again.

    python -m experiments.mnist_cnn [--dataset mnist|digits] [--smoke] [--out DIR] [--seeds N] [--epochs N]
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import rich
import rich.progress
import rich.table

import jaxvq
from experiments.data import Dataset, DatasetUnavailableError, load
from experiments.train import TrainConfig, Variables, accuracy, fit, network
from jaxvq import KMeans, Rule, Uniform

PUBLISHED = {"float": 98.12, "8 bits, biases 1 bit": 98.30, "float, fresh": 97.17, "8 values a tensor": 97.61}
BEFORE, SHARED, FREE, AGAIN = (
    "quantized",
    "values trained, still shared",
    "weights trained free",
    "then quantized again",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      dataset: "mnist" or "digits".
      train: the network and its training.
      retrain_epochs: passes over the images after the network was quantized.
      values: how many values per tensor the exercise tries; the most of them stand beside the source's.
      seeds: how many pairs of networks are trained.
      out: the folder to write to.
    """

    dataset: str
    train: TrainConfig
    retrain_epochs: int
    values: tuple[int, ...]
    seeds: int
    out: pathlib.Path


UNIFORM = (
    Rule(".*/kernel", Uniform(bits=8)),
    Rule(".*/scale", Uniform(bits=8)),
    Rule(".*/bias", Uniform(bits=1)),
)


_dequantized = jax.jit(jaxvq.dequantize_params)  # one program for a tree, not one for each shape in it


def quantized(variables: Variables, rules: Any, seed: int) -> Variables:
    """The network with its parameters as codes."""
    return {**variables, "params": jaxvq.quantize_params(variables["params"], rules, key=jax.random.key(seed))}


def decoded(variables: Variables) -> Variables:
    """The network with floats in place of codes."""
    return {**variables, "params": _dequantized(variables["params"])}


def to_values(k: int) -> Rule:
    """Every tensor, biases and normalization too, to `k` values of its own."""
    return Rule(".*", KMeans(k=k))


def count_distinct(variables: Variables) -> dict[str, int]:
    """How many values each tensor has, by path."""
    leaves = jax.tree.leaves_with_path(decoded(variables)["params"])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): len(np.unique(leaf)) for path, leaf in leaves}


def run(config: Config, dataset: Dataset, seed: int, track: Any) -> dict[str, Any]:
    """One pair of networks.

    Returns:
      Accuracies in percent by name, those of the exercise by the number of values, and the distinct values.
    """
    train = dataclasses.replace(config.train, seed=seed)
    again = dataclasses.replace(train, epochs=config.retrain_epochs, seed=seed + 1000)
    model = network(train, dataset)

    def percent(variables: Variables) -> float:
        return 100 * accuracy(model, decoded(variables), dataset)

    first = fit(dataset, train, progress=track("float"))
    rounded = quantized(first, UNIFORM, seed)
    fresh = dataclasses.replace(train, seed=seed + 100)
    second = fit(dataset, fresh, progress=track("float, fresh"))
    accuracies = {
        "float": percent(first),
        "8 bits, biases 1 bit": percent(rounded),
        "float, fresh": percent(second),
    }
    exercise = {}
    for k in sorted(config.values):
        small = quantized(second, to_values(k), seed)
        accuracies |= {f"{k} values a tensor": percent(small)} if k == max(config.values) else {}
        shared = fit(dataset, again, start=small, progress=track(f"{k} values, shared"))
        free = fit(dataset, again, start=decoded(small), progress=track(f"{k} values, free"))
        twice = quantized(free, to_values(k), seed)
        variants = {BEFORE: small, SHARED: shared, FREE: free, AGAIN: twice}
        exercise[k] = {name: percent(variables) for name, variables in variants.items()}
        exercise[k]["nbytes"] = nbytes(small)
        exercise[k]["nbytes_free"] = nbytes(free)
    return {"accuracies": accuracies, "exercise": exercise, "distinct": [count_distinct(v) for v in (first, rounded)]}


def nbytes(variables: Variables) -> int:
    """Bytes of all parameters, codes and codebooks included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment.

    Returns:
      Accuracies and sizes, as written to `results.json`.

    Raises:
      DatasetUnavailableError: when the data is not to be had.
    """
    dataset = load(config.dataset)
    config.out.mkdir(parents=True, exist_ok=True)
    runs = []
    with rich.progress.Progress() as bars:
        for seed in range(config.seeds):

            def track(text: str, number: int = seed + 1) -> Any:
                return lambda epochs: bars.track(epochs, description=f"{number} of {config.seeds}: {text}")

            runs.append(run(config, dataset, seed, track))
    found = {"dataset": config.dataset, "seeds": config.seeds, **summary(runs, config)}
    (config.out / "results.json").write_text(json.dumps(found, indent=2))
    draw(found).savefig(config.out / "mnist_cnn.png", dpi=150)
    _print(found)
    return found


def summary(runs: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Means and standard deviations over the networks, beside what was published."""

    def over(values: Sequence[float]) -> tuple[float, float]:
        return float(np.mean(values)), float(np.std(values))

    names = (BEFORE, SHARED, FREE, AGAIN)
    return {
        "accuracies": {
            name: {"published": PUBLISHED.get(name), "percent": over([one["accuracies"][name] for one in runs])}
            for name in runs[0]["accuracies"]
        },
        "exercise": {
            str(k): {
                **{name: over([one["exercise"][k][name] for one in runs]) for name in names},
                "nbytes": runs[0]["exercise"][k]["nbytes"],
                "nbytes_free": runs[0]["exercise"][k]["nbytes_free"],
            }
            for k in config.values
        },
        "distinct": {path: (count, runs[0]["distinct"][1][path]) for path, count in runs[0]["distinct"][0].items()},
    }


def _print(found: dict[str, Any]) -> None:
    table = rich.table.Table(title=f"Accuracy on {found['dataset']}, {found['seeds']} networks each")
    for column in ("network", "published", "got, %"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, row in found["accuracies"].items():
        published = "" if row["published"] is None else f"{row['published']:.2f}%"
        table.add_row(name, published, "{:.2f} ± {:.2f}".format(*row["percent"]))
    rich.print(table)
    table = rich.table.Table(title="Values per tensor, before and after training on (accuracy, %)")
    for column in ("values", "bytes", BEFORE, SHARED, f"{FREE} (bytes)", AGAIN):
        table.add_column(column, justify="right")
    for k, row in found["exercise"].items():
        shown = {name: "{:.2f} ± {:.2f}".format(*row[name]) for name in (BEFORE, SHARED, FREE, AGAIN)}
        shown[FREE] += f" ({row['nbytes_free']:,})"
        table.add_row(k, f"{row['nbytes']:,}", *shown.values())
    rich.print(table)
    table = rich.table.Table(title="Distinct values in each tensor, 8 bits and 1 bit")
    for column in ("tensor", "before", "after"):
        table.add_column(column, justify="left" if column == "tensor" else "right")
    for path, (before, after) in found["distinct"].items():
        table.add_row(path, f"{before:,}", f"{after:,}")
    rich.print(table)


def draw(found: dict[str, Any]) -> matplotlib.figure.Figure:
    """Published and measured accuracies, and the exercise."""
    figure = matplotlib.figure.Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(found["accuracies"])
    got = np.array([found["accuracies"][name]["percent"] for name in names])
    left.errorbar(range(len(names)), got[:, 0], got[:, 1], fmt="o", color="tab:blue", capsize=4, label="here")
    published = np.array([found["accuracies"][name]["published"] for name in names], float)
    left.plot(published, "x", color="tab:red", markersize=9, label="published, one network")
    for place, (value, _) in enumerate(got):
        left.annotate(f"{value:.2f}", (place, value), (8, 0), textcoords="offset points", va="center")
    left.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    left.set_xlim(-0.4, len(names) - 0.4)
    left.set(title="as in the source", ylabel=f"accuracy on {found['dataset']}, %")
    values = sorted(found["exercise"], key=int)
    colours = {BEFORE: "tab:grey", SHARED: "tab:blue", FREE: "black", AGAIN: "tab:orange"}
    for name, colour in colours.items():
        points = np.array([found["exercise"][k][name] for k in values])
        dashes = ":" if name == FREE else "-"
        wrong = 100 - points[:, 0]
        right.errorbar(range(len(values)), wrong, points[:, 1], fmt=f"o{dashes}", color=colour, capsize=4, label=name)
    sizes = [f"{k} values\n{found['exercise'][k]['nbytes'] / 1000:.0f} kB" for k in values]
    right.set_xticks(range(len(values)), sizes)
    full = found["exercise"][values[0]]["nbytes_free"]
    right.set(title=f"trained on after quantization (float: {full / 1000:.0f} kB)", xlabel="per tensor, and size")
    right.set(ylabel="wrong, %", yscale="log")
    middle = values[len(values) // 2]
    few = found["exercise"][middle]
    figure.suptitle(
        f"With {middle} values a tensor {few[BEFORE][0]:.1f}% are right; training the values alone makes it "
        f"{few[SHARED][0]:.1f}% in the same {few['nbytes'] / 1000:.0f} kB"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.mnist_cnn", description=__doc__)
    parser.add_argument("--dataset", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/mnist_cnn"), help="the folder to write to"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many pairs of networks")
    parser.add_argument("--epochs", type=int, default=5, help="of training the float networks")
    chosen = parser.parse_args(arguments)
    train = TrainConfig(epochs=chosen.epochs, batch_size=100, learning_rate=1e-3, decay=False, l1=1e-3, conv_bias=True)
    if chosen.smoke:
        small = dataclasses.replace(train, channels=(5, 5, 5), hidden=10, epochs=4, batch_size=50, learning_rate=1e-2)
        return Config("digits", small, 4, (4,), 1, chosen.out)
    return Config(chosen.dataset, train, min(2, chosen.epochs), (2, 4, 8), chosen.seeds, chosen.out)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except DatasetUnavailableError as unavailable:
        sys.exit(f"error: {unavailable}")
