"""A dense network for MNIST with 4-bit weights and activations, and as codebooks as small as row VQ at a tenth.

Trains a network of three dense layers, quantizes it in several ways, trains each quantized network on, and compares
size and accuracy. Which way is the best is decided on images held out of the training set, before the test.

    python -m experiments.mnist_mlp [--dataset digits|mnist] [--smoke] [--out DIR] [--seeds N]
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich
import rich.console
import rich.progress
import rich.table
from jaxtyping import Array, Float, Int
from matplotlib.ticker import LogLocator

import jaxvq
import jaxvq.linen
from experiments.data import Dataset, DatasetUnavailableError, load
from experiments.train import options
from jaxvq import KMeans, Product, Residual, RowVQ, Rule, Spec, StraightThrough, Symmetric
from jaxvq.methods import AbstractMethod

HELD_OUT = 6  # one in so many training images: 10,000 of MNIST's
BUDGET = "row VQ, 10%"  # no codebooks may be larger than these
FLOAT, ROUNDED, CODEBOOKS = "float", "W4A4", "codebooks"
COLOURS = {FLOAT: "black", ROUNDED: "tab:blue", CODEBOOKS: "tab:green"}
CEILING = 98.8  # percent; the figure's axis is stretched towards it

Images = Float[Array, "n pixels"]
Data = tuple[Images, Int[Array, " n"]]
Variables = dict[str, Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Training:
    """How a network trains.

    Attributes:
      epochs: passes over the images.
      rate: of learning.
      momentum: of stochastic gradient descent.
      adam: Adam, its rate falling to zero along a cosine, instead of gradient descent at a constant rate.
      batch_size: images per step.
    """

    epochs: int
    rate: float
    momentum: float | None = None
    adam: bool = False
    batch_size: int = 64

    def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """The optimizer; how long an epoch is decides how fast the rate falls."""
        if self.adam:
            return optax.adam(optax.cosine_decay_schedule(self.rate, self.epochs * steps_per_epoch))
        return optax.sgd(self.rate, momentum=self.momentum)


class Network(nn.Module):
    """Three dense layers with ReLU between them; `dense` makes a layer of so many features."""

    dense: Callable[..., nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "n classes"]:
        x: Any = images
        for index, width in enumerate((128, 64, 10)):
            x = self.dense(width, name=f"Dense_{index}")(nn.relu(x) if index else x)
        return x


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to quantize the trained network and to train it on.

    Attributes:
      name: as the table and the figure say it.
      kind: what the weights are while they train: float, rounded in each step, or codebooks with fixed codes.
      network: the network that trains.
      training: after it is quantized.
      spec: how the weights become codebooks; None when the layers of `network` say how, or when they stay float.
    """

    name: str
    kind: str
    network: Network
    training: Training
    spec: Spec | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      dataset: "digits" or "mnist".
      seeds: how many networks are trained.
      first: the training of the float network.
      variants: what becomes of it.
      out: the folder to write to.
    """

    dataset: str
    seeds: int
    first: Training
    variants: tuple[Variant, ...]
    out: pathlib.Path


def all_variants(batch_size: int) -> tuple[Variant, ...]:
    """The float network, three ways to 4-bit weights and activations, and codebooks about as small as row VQ's."""
    slow = Training(5, 1e-3, batch_size=batch_size)
    faster, adam = dataclasses.replace(slow, momentum=0.9), dataclasses.replace(slow, adam=True)
    palette = KMeans(bits=4, per="channel")
    sums = Residual(bits=8, stages=2, dim=8, codebook_dtype="bfloat16")
    codebooks = {
        BUDGET: (RowVQ(fraction=0.1), RowVQ(fraction=0.1), None),
        "palettes of 8": (KMeans(bits=3), KMeans(bits=3), KMeans(bits=4)),
        "palettes of 4 per channel": (KMeans(bits=2, per="channel"), palette, None),
        "product, k=256, d=4": (Product(bits=8, dim=4), palette, None),
        "residual, 2 x k=256, d=8": (sums, KMeans(bits=3, per="channel"), None),
    }
    return (
        Variant(FLOAT, FLOAT, Network(), slow),
        _rounded("W4A4, range of the batch", Symmetric(bits=4), None, slow),
        _rounded("W4A4, tracked range", Symmetric(bits=4), 0.99, slow),
        _rounded("W4A4, per channel, momentum", Symmetric(bits=4, per="channel"), 0.99, faster),
        *(_layerwise(name, methods, adam) for name, methods in codebooks.items()),
    )


def _rounded(name: str, method: Symmetric, momentum: float | None, training: Training) -> Variant:
    dense = partial(jaxvq.linen.Dense, method=method, training=StraightThrough(), act_bits=4, act_momentum=momentum)
    return Variant(name, ROUNDED, Network(dense), training)


def _layerwise(name: str, methods: Sequence[AbstractMethod | None], training: Training) -> Variant:
    """A method for each layer; None leaves the layer float."""
    spec = Spec(tuple(Rule(f"Dense_{index}/kernel", method) for index, method in enumerate(methods)))
    return Variant(name, CODEBOOKS, Network(jaxvq.linen.Dense), training, spec)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one way to quantize one network came to.

    Attributes:
      variant: the way.
      nbytes: of the parameters, everything counted, but for a file's header.
      untrained: accuracy right after the network was quantized.
      accuracy: after it was trained on.
      params: the trained parameters, quantized weights as `QuantizedArray`s.
    """

    variant: Variant
    nbytes: int
    untrained: float
    accuracy: float
    params: Any


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment.

    Returns:
      What it found, also written to `results.json`: a row for each variant, the best of each kind by the held-out
      images, and the files.

    Raises:
      DatasetUnavailableError: when the data is not to be had.
      RuntimeError: when the model loaded from a file has another accuracy than the one that was saved.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    dataset = load(config.dataset)
    both = itertools.chain(study(hold_out(dataset), config), study(dataset, config))
    count = config.seeds * len(config.variants)
    runs = list(rich.progress.track(both, "training", total=2 * count, console=rich.console.Console(stderr=True)))
    rows = [_row(variant, runs[:count], runs[count:]) for variant in config.variants]
    best = {kind: choose(rows, kind) for kind in COLOURS}
    rich.print(_table(rows, best, seeds=config.seeds))
    draw(rows, best, config=config).savefig(config.out / "mnist_mlp.png", dpi=150)
    finals = {run.variant.name: run for run in runs[count : count + len(config.variants)]}  # of the first seed
    files = [keep(finals[name], dataset, config) for name in dict.fromkeys((best[CODEBOOKS], BUDGET))]
    found = {"dataset": config.dataset, "seeds": config.seeds, "rows": rows, "best": best, "files": files}
    (config.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    rich.print(f"written to {config.out}: mnist_mlp.png, results.json, {', '.join(file['file'] for file in files)}")
    return found


def hold_out(dataset: Dataset) -> Dataset:
    """The training images alone, the last sixth of them to test on."""
    images, labels = dataset.train_images, dataset.train_labels
    kept = len(labels) - len(labels) // HELD_OUT
    return Dataset(dataset.name, dataset.classes, images[:kept], labels[:kept], images[kept:], labels[kept:])


def study(dataset: Dataset, config: Config) -> Iterator[Run]:
    """Trains one float network per seed; quantizes each in every way, trains it on and tests it."""
    train = as_data(dataset.train_images, dataset.train_labels)
    test = as_data(dataset.test_images, dataset.test_labels)
    for seed in range(config.seeds):
        key = jax.random.key(seed)
        start: Any = jax.jit(Network().init)(key, train[0][:1])
        params = fit(Network(), config.first, start, train, seed=seed)["params"]
        for variant in config.variants:
            network = variant.network
            before = begin(variant, params, train[0], key=key)
            after = fit(network, variant.training, before, train, seed=config.seeds + seed)
            if variant.kind == ROUNDED:
                harden = jax.jit(partial(jaxvq.linen.harden, network))
                after |= jaxvq.linen.to_variables(harden(after, train[0][:1], key=key))
            trained = jaxvq.linen.from_variables(after)
            nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((trained, after.get("quantization"))))
            yield Run(variant, nbytes, accuracy(network, before, test), accuracy(network, after, test), trained)


def as_data(images: Float[np.ndarray, "n height width 1"], labels: Int[np.ndarray, " n"]) -> Data:
    """The images as rows of values from -1 to 1, and their labels."""
    return jnp.asarray((images.reshape(len(images), -1) - 0.5) / 0.5), jnp.asarray(labels)


def begin(variant: Variant, params: Any, images: Images, *, key: Array) -> Variables:
    """The variables of a variant's network, from the parameters of the float network."""
    if variant.spec is not None:
        return jaxvq.linen.to_variables(jaxvq.quantize_params(params, variant.spec, key=key))
    run = jax.jit(partial(variant.network.apply, mutable=True))
    return dict(run({"params": params}, images)[1])


def fit(network: Network, training: Training, variables: Variables, data: Data, *, seed: int) -> Variables:
    """Trains what is in "params": weights, or codebooks; codes are in a collection of their own and stay."""
    steps = len(data[0]) // training.batch_size
    generator = np.random.default_rng(seed)
    state = training.optimizer(steps).init(variables["params"])
    for _ in range(training.epochs):
        order = generator.permutation(len(data[0]))[: steps * training.batch_size].reshape(steps, -1)
        variables, state = epoch(network, training, variables, state, data, order)
    return variables


@partial(jax.jit, static_argnums=(0, 1))
def epoch(
    network: Network, training: Training, variables: Variables, state: Any, data: Data, order: Int[Array, "steps b"]
) -> tuple[Variables, Any]:
    """One pass over the images in this order: the variables and the optimizer's state after it."""
    optimizer = training.optimizer(len(order))

    def step(carry: tuple[Variables, Any], batch: Int[Array, " b"]) -> tuple[tuple[Variables, Any], None]:
        variables, state = carry
        images, labels = (part[batch] for part in data)

        def loss(params: Any) -> tuple[Float[Array, ""], Any]:
            changed = variables | {"params": params}
            logits, ranges = jaxvq.linen.apply(network, changed, images, mutable=["quantization"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), ranges

        gradients, ranges = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer.update(gradients, state, variables["params"])
        return (variables | ranges | {"params": optax.apply_updates(variables["params"], changes)}, state), None

    return jax.lax.scan(step, (variables, state), order)[0]


def accuracy(network: Network, variables: Variables, data: Data) -> float:
    """The fraction of images that the network gets right."""
    return int(_count_correct(network, variables, data)) / len(data[0])


@partial(jax.jit, static_argnums=0)
def _count_correct(network: Network, variables: Variables, data: Data) -> Int[Array, ""]:
    return jnp.sum(jnp.argmax(jaxvq.linen.apply(network, variables, data[0]), axis=-1) == data[1])


def choose(rows: Sequence[Row], kind: str) -> str:
    """The name of the most accurate variant of a kind on the held-out images; codebooks within the bytes of row VQ."""
    budget = next(row["nbytes"] for row in rows if row["name"] == BUDGET)
    allowed = [row for row in rows if row["kind"] == kind and (kind != CODEBOOKS or row["nbytes"] <= budget)]
    return max(allowed, key=lambda row: (np.mean(row["held_out"]), -row["nbytes"]))["name"]


def keep(run: Run, dataset: Dataset, config: Config) -> Row:
    """Saves a model with codebooks, loads it from the file and tests what was loaded."""
    path = config.out / f"{run.variant.name.translate(str.maketrans(' =', '__', ',%'))}.safetensors"
    jaxvq.save(path, run.params, metadata={"dataset": config.dataset}, force=True)
    variables = jaxvq.linen.to_variables(jaxvq.load(path))
    loaded = accuracy(run.variant.network, variables, as_data(dataset.test_images, dataset.test_labels))
    if loaded != run.accuracy:
        raise RuntimeError(f"{path}: the loaded model's accuracy is {loaded!r}, before saving it was {run.accuracy!r}")
    file_nbytes = path.stat().st_size
    rich.print(f"{path.name}: {file_nbytes:,} bytes, accuracy from the file {loaded!r}, the same as before saving")
    return {"name": run.variant.name, "file": path.name, "file_nbytes": file_nbytes, "accuracy_loaded": loaded}


def _row(variant: Variant, validation: Sequence[Run], test: Sequence[Run]) -> Row:
    """Size and accuracies of a variant, one accuracy for each seed."""
    held_out, mine = ([run for run in runs if run.variant.name == variant.name] for runs in (validation, test))
    return {
        "name": variant.name,
        "kind": variant.kind,
        "nbytes": mine[0].nbytes,
        "held_out": [run.accuracy for run in held_out],
        "untrained": [run.untrained for run in mine],
        "accuracy": [run.accuracy for run in mine],
    }


def _table(rows: Sequence[Row], best: dict[str, str], *, seeds: int) -> rich.table.Table:
    table = rich.table.Table(
        caption="Everything is counted: codes, codebooks, scales, biases. Percent of the images that are right, mean "
        f"of {seeds} seeds: images held out of training, by which the best of each kind is chosen (bold); test images "
        "right after quantization; test images after training on, with the lowest and the highest seed.",
        caption_justify="left",
        box=None,
    )
    table.add_column("variant", no_wrap=True)
    for heading in ("kB", "held out", "before", "after", "low", "high"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        after = row["accuracy"]
        parts = (np.mean(row["held_out"]), np.mean(row["untrained"]), np.mean(after), min(after), max(after))
        cells = (row["name"], f"{row['nbytes'] / 1000:.1f}", *(f"{100 * part:.2f}" for part in parts))
        table.add_row(*cells, style="bold" if row["name"] in best.values() else None)
    return table


def draw(rows: Sequence[Row], best: dict[str, str], *, config: Config) -> matplotlib.figure.Figure:
    """Accuracy against size: one point for each variant, with a line from the lowest to the highest seed."""
    figure = matplotlib.figure.Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.add_subplot()
    for row, marker in zip(rows, itertools.cycle("osD^vP*<>")):
        mean, low, high = (100 * part(row["accuracy"]) for part in (np.mean, min, max))
        colour, bars = COLOURS[row["kind"]], [[mean - low], [high - mean]]
        label = f"{row['name']}: {row['nbytes'] / 1000:.1f} kB, {mean:.2f}%"
        style: Any = {"color": colour, "markerfacecolor": colour if row["name"] in best.values() else "white"}
        axes.errorbar(row["nbytes"] / 1000, mean, bars, fmt=marker, markersize=8, capsize=4, label=label, **style)
    named = {row["name"]: row for row in rows}
    percent = {name: f"{100 * np.mean(row['accuracy']):.2f}%" for name, row in named.items()}
    axes.axvline(named[BUDGET]["nbytes"] / 1000, color=COLOURS[CODEBOOKS], linewidth=1, linestyle=":")
    axes.axhline(100 * np.mean(named[FLOAT]["accuracy"]), color="black", linewidth=1)
    axes.axhline(100 * np.mean(named[FLOAT]["untrained"]), color="black", linewidth=1, linestyle="--")
    axes.set_xscale("log", subs=[])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    stretch = (lambda percent: -np.log(np.maximum(CEILING - percent, 1e-3)), lambda t: CEILING - np.exp(-t))
    axes.set_yscale("function", functions=stretch)
    axes.set_yticks([tick for tick in (10, 50, 80, 90, 93, 95, 96, 97, 97.5, 98) if tick > axes.get_ylim()[0]])
    axes.grid(alpha=0.3)
    axes.set_xlabel("size of the whole network, kB (1 kB = 1,000 bytes; log scale)")
    axes.set_ylabel(f"test accuracy, % (stretched towards {CEILING:g})")
    axes.set_title(
        f"{config.dataset}: in the bytes of row VQ ({percent[BUDGET]}), {best[CODEBOOKS]} keeps "
        f"{percent[best[CODEBOOKS]]};\n4-bit weights and activations keep {percent[best[ROUNDED]]}, float is "
        f"{percent[FLOAT]}"
    )
    figure.legend(loc="outside right center", frameon=False, title="filled: best of its kind on held-out images")
    note = f"Means of {config.seeds} seeds, bars from the lowest to the highest. Dashed: float after first training; "
    figure.supxlabel(note + "line: trained on as long as the others. Dotted: the bytes of row VQ.", fontsize="small")
    return figure


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    asked = options(arguments, name="mnist_mlp", description=__doc__)
    first = Training(10, 0.1, batch_size=64 if asked.dataset == "mnist" else 16)
    variants = all_variants(first.batch_size)
    if asked.smoke:  # one of each kind, which compile quickly
        rows = _layerwise(BUDGET, (RowVQ(fraction=0.1), None, None), variants[-1].training)
        return Config(asked.dataset, 1, first, (*variants[:2], rows), asked.out)
    return Config(asked.dataset, asked.seeds, first, variants, asked.out)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except DatasetUnavailableError as unavailable:
        sys.exit(f"error: {unavailable}")
