"""How long a training step of a quantized dense layer takes, beside the same layer in float.

    python -m experiments.bench_layers [--smoke] [--out FOLDER]

Claim: a step that trains the codebook of a 1024 x 1024 layer at batch 256 takes at most 1.5 times as long as a step
that trains the weight, compiles once, and leaves every code as it was, also after 1,000 steps of AdamW with weight
decay. A step is the loss, the gradients of the layer's parameters and of its input, and the optimizer's update.
Times are medians of steps that take turns, after compilation.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import rich.box
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

import jaxvq
import jaxvq.linen
from jaxvq.array import QuantizedArray
from jaxvq.methods import AbstractMethod

METHODS: dict[str, AbstractMethod | None] = {
    "float": None,
    "Symmetric(bits=4)": jaxvq.Symmetric(bits=4),
    "Symmetric(bits=4, channel)": jaxvq.Symmetric(bits=4, per="channel"),
    "KMeans(bits=2)": jaxvq.KMeans(bits=2),
    "KMeans(bits=4)": jaxvq.KMeans(bits=4),
    "KMeans(bits=4, channel)": jaxvq.KMeans(bits=4, per="channel"),
    "KMeans(bits=4, group of 64)": jaxvq.KMeans(bits=4, per=64),
    "KMeans(bits=8)": jaxvq.KMeans(bits=8),
    "Product(bits=8, dim=4)": jaxvq.Product(bits=8, dim=4, iterations=2),
    "Product(bits=8, dim=8)": jaxvq.Product(bits=8, dim=8, iterations=2),
    "Residual(2 x 8 bits, dim=8)": jaxvq.Residual(stages=2, bits=8, dim=8, iterations=2),
    "RowVQ(0.1)": jaxvq.RowVQ(0.1, iterations=2),
}
OPTIMIZERS = {"sgd, momentum": optax.sgd(1e-3, momentum=0.9), "adamw": optax.adamw(1e-3, weight_decay=1e-2)}
Params = dict[str, Any]
Data = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      width: input and output features.
      batch: rows of the input.
      methods: which of `METHODS`, the first one being the reference.
      repeats: timed steps of each contender.
      steps: of AdamW, after which the codes are compared.
      most: the largest ratio that the claim allows.
      seed: of the weight, the data and the clustering.
      out: the folder for chart and results.
    """

    width: int = 1024
    batch: int = 256
    methods: tuple[str, ...] = tuple(METHODS)
    repeats: int = 60
    steps: int = 1_000
    most: float = 1.5
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/bench_layers")


SMOKE = Config(
    width=64, batch=16, methods=("float", "Symmetric(bits=4)", "KMeans(bits=4)", "RowVQ(0.1)"), repeats=3, steps=20
)


class Trainer:
    """A layer in training: parameters, optimizer state and the one compiled step."""

    def __init__(self, params: Params, optimizer: optax.GradientTransformation, data: Data) -> None:
        # A step gives its arrays away to the next, so it works on copies.
        self.params, self.optimizer, self.data = jax.tree.map(jnp.copy, params), optimizer, data
        self.state = optimizer.init(jaxvq.partition(params)[0])
        self.traces = 0
        self._step = jax.jit(self._traced, donate_argnums=(0, 1))

    def step(self) -> tuple[jax.Array, jax.Array]:
        """One update; returns the loss and the gradient of the input."""
        self.params, self.state, loss, x_gradient = self._step(self.params, self.state, *self.data)
        return loss, x_gradient

    def _traced(
        self, params: Params, state: optax.OptState, x: jax.Array, target: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
        self.traces += 1
        trainable, frozen = jaxvq.partition(params)

        def loss(trainable: Params, x: jax.Array) -> jax.Array:
            variables = jaxvq.linen.to_variables(jaxvq.combine(trainable, frozen))
            return jnp.mean((jaxvq.linen.apply(nn.Dense(target.shape[-1]), variables, x) - target) ** 2)

        value, (gradient, x_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(trainable, x)
        updates, state = self.optimizer.update(gradient, state, trainable)
        return jaxvq.combine(optax.apply_updates(trainable, updates), frozen), state, value, x_gradient


def main(config: Config) -> dict[str, Any]:
    """Times every method under every optimizer; returns `{"config", "device", "rows", "codes_kept"}` and draws it."""
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    x_key, target_key, *_ = keys(config)
    data = tuple(jax.random.normal(key, (config.batch, config.width)) for key in (x_key, target_key))
    layers = {
        name: layer(name, config) for name in track(config.methods, "quantizing", console=console, transient=True)
    }
    rows = []
    for optimizer in OPTIMIZERS:
        trainers = {name: Trainer(params, OPTIMIZERS[optimizer], data) for name, params in layers.items()}
        rows += measure(optimizer, trainers, config, console)
    console.print(as_table(rows, config))
    quantized = {name: params for name, params in layers.items() if METHODS[name] is not None}
    kept = {name: codes_kept(name, params, data, config, console) for name, params in quantized.items()}
    console.print(f"codes bit-identical after {config.steps} AdamW steps: {verdict(kept)}")
    once = {f"{row['method']} ({row['optimizer']})": row["traces"] == 1 for row in rows}
    console.print(f"one compilation for all steps: {verdict(once)}")
    result = {
        "config": dataclasses.asdict(config) | {"out": str(config.out)},
        "device": jax.devices()[0].device_kind,
        "rows": rows,
        "codes_kept": kept,
    }
    (config.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, config)
    console.print(f"written to {config.out}")
    return result


def keys(config: Config) -> jax.Array:
    return jax.random.split(jax.random.key(config.seed), 4)


def layer(name: str, config: Config) -> Params:
    """The parameters of a dense layer, its kernel quantized by the method `name`."""
    method, width = METHODS[name], config.width
    kernel = jax.random.normal(keys(config)[2], (width, width)) / width**0.5
    params = {"kernel": kernel, "bias": jnp.zeros(width)}
    return params if method is None else jaxvq.quantize_params(params, method, key=keys(config)[3])


def measure(optimizer: str, trainers: dict[str, Trainer], config: Config, console: Console) -> list[dict[str, Any]]:
    """Times the trainers in turns; a row for each."""
    milliseconds: dict[str, list[float]] = {name: [] for name in trainers}
    for run in track(range(config.repeats + 2), f"timing, {optimizer}", console=console, transient=True):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            jax.block_until_ready((trainer.step(), trainer.params))
            if run >= 2:  # the first step compiles, the second is the first to reuse its buffers
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    return [
        {
            "optimizer": optimizer,
            "method": name,
            "bits_per_weight": bits_per_weight(trainer.params["kernel"]),
            "milliseconds": medians[name],
            "ratio": medians[name] / medians[config.methods[0]],
            "traces": trainer.traces,
        }
        for name, trainer in trainers.items()
    ]


def bits_per_weight(kernel: jax.Array | QuantizedArray) -> float:
    return kernel.bits_per_weight if isinstance(kernel, QuantizedArray) else 8.0 * kernel.dtype.itemsize


def codes_kept(name: str, params: Params, data: Data, config: Config, console: Console) -> bool:
    """Whether after training the codes are the same bits, and the decoder is not."""
    before = jax.tree.map(np.array, params["kernel"])
    trainer = Trainer(params, OPTIMIZERS["adamw"], data)
    for _ in track(range(config.steps), f"training, {name}", console=console, transient=True):
        trainer.step()
    after = jax.tree.map(np.array, trainer.params["kernel"])
    trained = any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before.decoder, after.decoder)), strict=True))
    return bool((before.codes.words == after.codes.words).all() and trained)


def verdict(holds: dict[str, bool]) -> str:
    failed = [name for name, held in holds.items() if not held]
    return "yes, all methods" if not failed else f"NO: {', '.join(failed)}"


def as_table(rows: list[dict[str, Any]], config: Config) -> Table:
    title = f"one training step, {config.width} x {config.width}, batch {config.batch}"
    method = Column("method", no_wrap=True)
    table = Table("optimizer", method, "bits/weight", "ms", "ratio", "traces", title=title, box=rich.box.SIMPLE_HEAD)
    for row in rows:
        numbers = f"{row['bits_per_weight']:.2f}", f"{row['milliseconds']:.2f}", f"{row['ratio']:.2f}"
        table.add_row(row["optimizer"], row["method"], *numbers, str(row["traces"]))
    return table


def draw(rows: list[dict[str, Any]], config: Config) -> None:
    """A panel per optimizer, a bar per method: its length the time in units of the float layer's."""
    figure, panels = plt.subplots(
        1, len(OPTIMIZERS), figsize=(11, 0.32 * len(config.methods) + 1.6), sharey=True, sharex=True
    )
    for axes, optimizer in zip(panels, OPTIMIZERS, strict=True):
        part = [row for row in rows if row["optimizer"] == optimizer]
        ratios = [row["ratio"] for row in part]
        axes.barh([row["method"] for row in part], ratios, color=["0.6", *["tab:blue"] * (len(part) - 1)])
        for place, row in enumerate(part):
            axes.text(row["ratio"], place, f" {row['ratio']:.2f}", va="center", fontsize=9)
        axes.axvline(config.most, color="tab:red", linestyle="--", linewidth=1)
        axes.set_title(f"{optimizer}: float takes {part[0]['milliseconds']:.1f} ms", loc="left", fontsize=10)
        axes.set_xlabel(f"time of a training step; dashed: {config.most} x float")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlim(0, 1.15 * max(config.most, *(row["ratio"] for row in rows)))
    panels[0].invert_yaxis()
    most = max(row["ratio"] for row in rows)
    figure.suptitle(
        f"A {config.width} x {config.width} layer trains its codebook in at most {most:.2f} times a float step, "
        f"batch {config.batch}",
        x=0.01,
        ha="left",
    )
    figure.tight_layout()
    figure.savefig(config.out / "bench_layers.png", dpi=120)
    plt.close(figure)


def cli() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", default=Config.out)
    arguments = parser.parse_args()
    main(dataclasses.replace(SMOKE if arguments.smoke else Config(), out=arguments.out))


if __name__ == "__main__":
    cli()
