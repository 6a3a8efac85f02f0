"""A classifier of two moons keeps learning after every weight became one of eight values.

Trains a small network, replaces each weight matrix by a few values found by k-means, and trains on: once as published,
every weight free to leave its value again, and once with the values shared, so that the network stays small.

    python -m experiments.two_moons [--layerwise] [--smoke] [--out DIR] [--seeds N]
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import matplotlib.figure
import numpy as np
import optax
import rich
import rich.progress
import rich.table
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

import jaxvq
from jaxvq import KMeans, Rule, Spec

PUBLISHED = {False: ((0.675, 0.416), (0.410, 0.336)), True: ((0.662, 0.324), (0.297, 0.188))}
FREE, SHARED, FLOAT = "every weight free again (as published)", "values shared, codes fixed", "never quantized"
Progress = Callable[[Sequence[int]], Iterable[int]]
COLOURS = {FREE: "tab:orange", SHARED: "tab:blue", FLOAT: "black"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      layerwise: 8, 16 and 4 values for the three layers instead of 8 for each.
      seeds: how many networks are trained.
      out: the folder to write to.
      samples: points of the two moons.
      noise: their standard deviation about the moons.
      widths: of the layers.
      epochs: before and after the weights are replaced.
      batch_size: points per step.
      learning_rate: of Adam.
    """

    layerwise: bool
    seeds: int
    out: pathlib.Path
    samples: int = 1000
    noise: float = 0.2
    widths: tuple[int, ...] = (16, 8, 1)
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3

    @property
    def spec(self) -> Spec:
        """How the three layers are quantized."""
        if not self.layerwise:
            return Spec(default=KMeans(k=8))
        return Spec(tuple(Rule(f"Dense_{i}/kernel", KMeans(k=k)) for i, k in enumerate((8, 16, 4))))


class Classifier(nn.Module):
    """Dense layers with ReLU between them, and one logit; its first weights are uniform, as in the source."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        for index, width in enumerate(self.widths):
            first = _uniform(x.shape[-1] ** -0.5)
            x = nn.Dense(width, kernel_init=first, bias_init=first)(x)
            x = nn.relu(x) if index + 1 < len(self.widths) else x
        return x[:, 0]


def _uniform(bound: float) -> Any:
    def initialize(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


@dataclasses.dataclass(frozen=True)
class Run:
    """How one network trained.

    Attributes:
      losses: mean loss of each epoch.
      last_batch: loss of the very last batch, which some sources print instead.
      distinct: distinct values among the weights after each epoch.
      accuracy: at the end, on the points that it was trained on.
      nbytes: of the trained tree, everything counted.
      params: the trained tree.
    """

    losses: list[float]
    last_batch: float
    distinct: list[int]
    accuracy: float
    nbytes: int
    params: Any


def moons(config: Config) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """The data: `make_moons` of scikit-learn with random state 42."""
    import sklearn.datasets

    points, labels = sklearn.datasets.make_moons(config.samples, noise=config.noise, random_state=42)
    return np.asarray(points, np.float32), np.asarray(labels, np.float32)


def train(params: Any, config: Config, seed: int) -> Run:
    """Trains everything in `params` that is a float: weights, or the values that they share."""
    trainable, frozen = jaxvq.partition(params)
    state = optax.adam(config.learning_rate).init(trainable)
    generator = np.random.default_rng(seed)
    points, labels = moons(config)
    steps = config.samples // config.batch_size
    losses, distinct, last_batch = [], [], 0.0
    for _ in range(config.epochs):
        order = generator.permutation(config.samples)[: steps * config.batch_size].reshape(steps, config.batch_size)
        trainable, state, loss = _epoch(config, trainable, frozen, state, points[order], labels[order])
        losses.append(float(loss.mean()))
        last_batch = float(loss[-1])
        distinct.append(count_distinct(jaxvq.combine(trainable, frozen)))
    params = jaxvq.combine(trainable, frozen)
    logits = Classifier(config.widths).apply({"params": jaxvq.dequantize_params(params)}, points)
    accuracy = float(np.mean((np.asarray(logits) > 0) == labels))
    return Run(losses, last_batch, distinct, accuracy, nbytes(params), params)


@functools.partial(jax.jit, static_argnums=0)
def _epoch(
    config: Config,
    trainable: Any,
    frozen: Any,
    state: Any,
    points: Float[Array, "steps b 2"],
    labels: Float[Array, "steps b"],
) -> tuple[Any, Any, Float[Array, " steps"]]:
    def loss(trainable: Any, x: Array, y: Array) -> Float[Array, ""]:
        params = jaxvq.dequantize_params(jaxvq.combine(trainable, frozen))
        logits: Any = Classifier(config.widths).apply({"params": params}, x)
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    def step(carry: Any, batch: tuple[Array, Array]) -> tuple[Any, Array]:
        trainable, state = carry
        value, gradients = jax.value_and_grad(loss)(trainable, *batch)
        updates, state = optax.adam(config.learning_rate).update(gradients, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    (trainable, state), losses = jax.lax.scan(step, (trainable, state), (points, labels))
    return trainable, state, losses


def count_distinct(params: Any) -> int:
    """Distinct values among the weights, summed over the layers; biases are left out."""
    weights = [leaf for leaf in jax.tree.leaves(jaxvq.dequantize_params(params)) if leaf.ndim > 1]
    return sum(len(np.unique(weight)) for weight in weights)


def nbytes(params: Any) -> int:
    """Bytes of all leaves, codes and codebooks included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment.

    Returns:
      The losses, sizes and accuracies of every seed, as written to `results.json`.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    before, after = study(config, progress=functools.partial(rich.progress.track, description="networks"))
    found = summary(before, after, config)
    (config.out / "results.json").write_text(json.dumps(found, indent=2))
    draw(before, after, config).savefig(config.out / _name(config, "png"), dpi=150)
    _print(found)
    return found


def study(config: Config, *, progress: Progress = iter) -> tuple[list[Run], dict[str, list[Run]]]:
    """Trains every network, replaces its weights and trains it on, in three ways.

    Returns:
      The runs before, one for each seed, and those after, by the way of training on.
    """
    before: list[Run] = []
    after: dict[str, list[Run]] = {FREE: [], SHARED: [], FLOAT: []}
    for seed in progress(range(config.seeds)):
        first = train(begin(config, seed), config, seed)
        small = jaxvq.quantize_params(first.params, config.spec, key=jax.random.key(seed))
        before.append(first)
        starts = {FREE: jaxvq.dequantize_params(small), SHARED: small, FLOAT: first.params}
        for name, start in starts.items():
            after[name].append(train(start, config, seed + 1000))
    return before, after


def begin(config: Config, seed: int) -> Any:
    """The parameters of a network before its training."""
    points, _ = moons(config)
    return Classifier(config.widths).init(jax.random.key(seed), points[:1])["params"]


def summary(before: list[Run], after: dict[str, list[Run]], config: Config) -> dict[str, Any]:
    """Means and standard deviations over the networks, beside what was published."""
    (first, last), (first_after, last_after) = PUBLISHED[config.layerwise]
    rows = {"float, before": (before, (first, last))}
    rows |= {name: (runs, (first_after, last_after) if name == FREE else None) for name, runs in after.items()}
    return {
        "layerwise": config.layerwise,
        "seeds": config.seeds,
        "rows": {
            name: {
                "published": published,
                "first_loss": _mean_and_spread([run.losses[0] for run in runs]),
                "last_loss": _mean_and_spread([run.losses[-1] for run in runs]),
                "last_batch_between": (min(run.last_batch for run in runs), max(run.last_batch for run in runs)),
                "accuracy": _mean_and_spread([run.accuracy for run in runs]),
                "distinct": _mean_and_spread([run.distinct[-1] for run in runs]),
                "nbytes": runs[0].nbytes,
            }
            for name, (runs, published) in rows.items()
        },
    }


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values))


def _print(found: dict[str, Any]) -> None:
    table = rich.table.Table(title=f"Two moons, mean and standard deviation over {found['seeds']} networks")
    for column in (
        "training",
        "published",
        "first epoch",
        "last epoch",
        "last batch",
        "accuracy",
        "distinct weights",
        "bytes",
    ):
        table.add_column(column, justify="left" if column == "training" else "right")
    for name, row in found["rows"].items():
        published = "" if row["published"] is None else "{:.3f} → {:.3f}".format(*row["published"])
        losses = ["{:.3f} ± {:.3f}".format(*row[part]) for part in ("first_loss", "last_loss")]
        accuracy, distinct = f"{100 * row['accuracy'][0]:.1f}%", f"{row['distinct'][0]:.0f}"
        batch = "{:.2f} to {:.2f}".format(*row["last_batch_between"])
        table.add_row(name, published, *losses, batch, accuracy, distinct, f"{row['nbytes']:,}")
    rich.print(table)


def draw(before: list[Run], after: dict[str, list[Run]], config: Config) -> matplotlib.figure.Figure:
    """Loss and number of distinct weights over the epochs, and what the small network says of the plane."""
    figure = matplotlib.figure.Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    sizes = {name: runs[0].nbytes for name, runs in after.items()}
    figure.suptitle(
        f"With {' / '.join(str(n) for n in _entries(config))} shared values a layer the network keeps learning "
        f"in {sizes[SHARED]:,} bytes; left free, it is back at {sizes[FREE]:,}"
    )
    for axes, part, label in (
        (left, "losses", "mean loss of the epoch (nats)"),
        (middle, "distinct", "distinct weights"),
    ):
        _curve(axes, 0, [getattr(run, part) for run in before], "black", None)
        for name, runs in after.items():
            _curve(axes, config.epochs, [getattr(run, part) for run in runs], COLOURS[name], name)
        axes.axvline(config.epochs + 0.5, color="grey", linestyle=":", linewidth=1)
        axes.text(config.epochs + 0.7, 0.4, "weights\nreplaced", transform=axes.get_xaxis_transform(), color="grey")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    (first, last), (first_after, last_after) = PUBLISHED[config.layerwise]
    epochs = (1, config.epochs, config.epochs + 1, 2 * config.epochs)
    left.plot(epochs, (first, last, first_after, last_after), "x", color="tab:red", label="published (one network)")
    left.legend(loc="upper right", fontsize="small")
    _boundary(right, after[SHARED][0], config)
    return figure


def draw_plane(run: Run, config: Config) -> matplotlib.figure.Figure:
    """The points, and what one network says of the plane."""
    figure = matplotlib.figure.Figure(figsize=(6, 4.4), layout="constrained")
    axes = figure.subplots()
    _boundary(axes, run, config)
    axes.set_title(f"{100 * run.accuracy:.1f}% right, {run.distinct[-1]} distinct weights")
    return figure


def _curve(axes: Axes, start: int, runs: list[Any], colour: str, label: str | None) -> None:
    values = np.asarray(runs, float)
    epochs = start + 1 + np.arange(values.shape[1])
    axes.plot(epochs, values.mean(axis=0), color=colour, label=label)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _boundary(axes: Axes, run: Run, config: Config) -> None:
    points, labels = moons(config)
    x, y = np.meshgrid(np.linspace(-1.8, 2.8, 200), np.linspace(-1.4, 1.9, 200))
    grid = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)
    logits = Classifier(config.widths).apply({"params": jaxvq.dequantize_params(run.params)}, grid)
    probability = 1 / (1 + np.exp(-np.asarray(logits))).reshape(x.shape)
    axes.contourf(x, y, probability, levels=np.linspace(0, 1, 11), cmap="RdBu", alpha=0.5)
    axes.contour(x, y, probability, levels=[0.5], colors="black", linewidths=1)
    for label, colour in ((0, "tab:red"), (1, "tab:blue")):
        axes.scatter(*points[labels == label].T, s=4, color=colour, label=f"moon {label}")
    axes.set_title(f"shared values: {run.distinct[-1]} distinct weights, {100 * run.accuracy:.1f}% right", fontsize=10)
    axes.set_xlabel("first coordinate")
    axes.set_ylabel("second coordinate")
    axes.legend(loc="lower left", fontsize="small")


def _entries(config: Config) -> tuple[int, ...]:
    return (8, 16, 4) if config.layerwise else (8, 8, 8)


def _name(config: Config, suffix: str) -> str:
    return f"two_moons{'_layerwise' if config.layerwise else ''}.{suffix}"


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.two_moons", description=__doc__)
    parser.add_argument("--layerwise", action="store_true", help="8, 16 and 4 values for the three layers")
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/two_moons"), help="the folder to write to"
    )
    parser.add_argument("--seeds", type=int, default=10, help="how many networks")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        return Config(chosen.layerwise, 1, chosen.out, samples=200, epochs=2)
    return Config(chosen.layerwise, chosen.seeds, chosen.out)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
