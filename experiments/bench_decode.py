"""How fast a language model writes from its codes, and in how much memory, beside the same model in bfloat16.

    python -m experiments.bench_decode [--smoke] [--only NAME ...] [--fitted LAYERS] [--out FOLDER]

Claim: on one NVIDIA H200 a transformer of 1.24 billion weights, the shapes of Llama 3.2 1B, decodes greedily at batch
1 at least 1.8 times as many tokens per second with 4-bit palettes as with bfloat16 weights, in at most 0.35 times the
memory. Every matrix is quantized, the table of the tokens too, which is embedding and output layer in one; norms stay
bfloat16, as do palettes, codebooks and scales, so that nothing is converted while it runs.

All new tokens come out of one program, in which XLA may run at the same time what does not wait for each other. The
time of a token is that of a long run less that of a short one, over the difference in tokens; runs take turns, and the
median counts. Memory is what that program needs on the device: weights, the cache of keys and values, and everything in
between. The weights are random: what they are does not change the speed. `--fitted 1` therefore saves time: it
quantizes one layer and makes the others of its codes, their output features in another order. The logits are compared
with those of the same model with its weights decoded beforehand.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rich.box
from jaxtyping import Array, Float, Int32
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

import jaxvq
from experiments.decoder import DTYPE, Model, Params, decode, empty_cache, forward, init_layer, init_table
from experiments.settled import settle
from jaxvq.array import is_quantized
from jaxvq.methods import AbstractMethod

METHODS: dict[str, AbstractMethod | None] = {
    "bf16": None,
    "4-bit palettes": jaxvq.KMeans(bits=4, per="channel", codebook_dtype="bfloat16"),
    "4-bit int8 palettes": jaxvq.KMeans(bits=4, per="channel", codebook_dtype="int8"),
    "3-bit palettes": jaxvq.KMeans(bits=3, per="channel", codebook_dtype="bfloat16"),
    "2-bit codebooks": jaxvq.Residual(stages=2, bits=8, dim=8, codebook_dtype="bfloat16", iterations=3),
}
REFERENCE = "bf16"
# The programs of a token are one CUDA graph; by default XLA puts them into it one after the other.
AT_ONCE: dict[str, str | bool] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is decoded.

    Attributes:
      model: the shapes.
      contenders: which of `METHODS`; the reference is always among them.
      judged: those that must reach the targets.
      prompt: tokens before the new ones.
      tokens: new tokens of the long run.
      short: new tokens of the short run.
      repeats: timed pairs of runs.
      fitted: layers with weights of their own; the others are these with their output features in another order.
      bandwidth: bytes per second that the device's memory can deliver, for the floor.
      faster: the least ratio of tokens per second to the reference.
      smaller: the largest ratio of memory to the reference.
      largest_error: of the logits, relative to those of the decoded weights.
      seed: of the weights, the prompt and the clustering.
      out: the folder for chart and results.
    """

    model: Model = dataclasses.field(default_factory=Model)
    contenders: tuple[str, ...] = tuple(METHODS)
    judged: tuple[str, ...] = ("4-bit palettes", "4-bit int8 palettes")
    prompt: int = 16
    tokens: int = 128
    short: int = 16
    repeats: int = 15
    fitted: int = 16
    bandwidth: float = 4.8e12
    faster: float = 1.8
    smaller: float = 0.35
    largest_error: float = 1e-2
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/bench_decode")


SMOKE = Config(
    model=Model(layers=2, width=64, heads=4, kv_heads=2, hidden=64, vocabulary=128),
    contenders=(REFERENCE, "4-bit palettes"),
    prompt=4,
    tokens=64,
    short=4,
    repeats=3,
    fitted=1,
)


def main(config: Config) -> dict[str, Any]:
    """Measures every contender; returns `{"config", "device", "rows"}`, written and drawn.

    Raises:
      RuntimeError: when logits are not finite or not those of the decoded weights.
    """
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    device = jax.local_devices()[0].device_kind
    rows: list[Row] = []
    for name in dict.fromkeys((REFERENCE, *config.contenders)):
        rows.append(measure(name, config, console))
        rows[-1] |= against(rows[-1], rows[0], config)
        result = {"config": dataclasses.asdict(config) | {"out": str(config.out)}, "device": device, "rows": rows}
        (config.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        console.print(summary(rows[-1]))
    console.print(as_table(rows, config, device))
    for row in rows:
        if "reached" in row:
            console.print(verdict(row, config))
    draw(rows, config, device)
    console.print(f"written to {config.out}")
    check(rows, config)
    return result


def build(method: AbstractMethod | None, config: Config, console: Console) -> Params:
    """The model with random weights, quantized layer by layer, so that the float weights never exist all at once."""
    key = jax.random.key(config.seed)

    def quantized(weights: Params, index: int) -> Params:
        if method is None:
            return weights
        spec = jaxvq.Spec(default=method, out_axis=0)
        return stored_in_half(jaxvq.quantize_params(weights, spec, key=jax.random.fold_in(key, index)))

    count = config.model.layers
    fitted = max(1, min(config.fitted, count))
    layers = []
    for index in track(range(fitted), "making layers", console=console, transient=True):
        layers.append(quantized(init_layer(jax.random.fold_in(key, index), config.model), index))
    layers += [reordered(layers[index % fitted], index) for index in range(fitted, count)]
    table = quantized(init_table(jax.random.fold_in(key, count), config.model), count)
    return table | {"norm": jnp.ones(config.model.width, DTYPE), "layers": layers}


def stored_in_half(params: Params) -> Params:
    """The parameters with every float leaf in the dtype of the activations: int8 palettes have float32 scales."""
    trainable, frozen = jaxvq.partition(params)
    return jaxvq.combine(jax.tree.map(lambda leaf: leaf.astype(DTYPE), trainable), frozen)


def reordered(layer: Params, places: int) -> Params:
    """A layer whose output features are those of another, some places further."""

    def roll(weight: Any) -> Any:
        if not is_quantized(weight):
            return jnp.roll(weight, places, axis=0)
        # Axis 1 of codes and decoders is the output side. Tiny matrices are packed along it: then words move.
        return jax.tree.map(lambda leaf: jnp.roll(leaf, places, axis=1), weight)

    return jax.tree.map(roll, layer, is_leaf=is_quantized)


def measure(name: str, config: Config, console: Console) -> Row:
    """Builds a contender, runs it and compares its logits; on return its memory is free again."""
    began = time.perf_counter()
    params = jax.block_until_ready(build(METHODS[name], config, console))
    built = time.perf_counter() - began
    prompt = jax.random.randint(jax.random.key(config.seed), (config.prompt,), 0, config.model.vocabulary)
    cache = empty_cache(config.prompt + config.tokens, config.model)
    start, position = forward(params, cache, prompt, jnp.int32(0), config.model), jnp.int32(config.prompt)
    programs = {
        count: decode.lower(params, *start, position, count=count, model=config.model).compile(compiler_options=AT_ONCE)
        for count in (config.short, config.tokens)
    }
    seconds: dict[int, list[float]] = {count: [] for count in programs}
    logits = start[0]
    settle()
    for run in track(range(config.repeats + 1), f"decoding, {name}", console=console, transient=True):
        for count, program in programs.items():
            began = time.perf_counter()
            _, logits = jax.block_until_ready(program(params, *start, position))
            if run:  # the first one warms up
                seconds[count].append(time.perf_counter() - began)
    more = config.tokens - config.short
    each = [(long - short) / more for short, long in zip(*seconds.values(), strict=True)]
    weights = nbytes(params)
    return {
        "contender": name,
        "weights": size(params),
        "bits_per_weight": 8 * weights / size(params),
        "build_seconds": built,
        "weight_nbytes": weights,
        **device_memory(programs[config.tokens]),
        "milliseconds": 1e3 * statistics.median(each),
        "tokens_per_second": 1 / statistics.median(each),
        "floor_milliseconds": 1e3 * weights / config.bandwidth,
        "finite": bool(jnp.isfinite(logits).all()),
        "relative_error": None if METHODS[name] is None else relative_error(params, prompt, cache, config),
    }


def nbytes(params: Params) -> int:
    """Bytes of all arrays: codes, codebooks, scales, norms."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def size(params: Params) -> int:
    """The weights that the arrays stand for."""
    return sum(leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_quantized))


def device_memory(program: jax.stages.Compiled) -> dict[str, int | None]:
    """What the program needs by the compiler's plan, and what the device says, where it does.

    The device's peak is that of the process so far, with what it took to quantize.
    """
    plan: Any = program.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "program_nbytes": planned - plan.alias_size_in_bytes,
        "in_use_nbytes": stats.get("bytes_in_use"),
        "peak_nbytes": stats.get("peak_bytes_in_use"),
    }


def relative_error(
    params: Params, prompt: Int32[Array, " t"], cache: list[Float[Array, "..."]], config: Config
) -> float:
    """How far the logits are from those of decoded weights, after the prompt and after one more token; the larger."""

    def logits(params: Params) -> list[Float[Array, " vocabulary"]]:
        first, kept = forward(params, cache, prompt, jnp.int32(0), config.model)
        return [first, forward(params, kept, prompt[:1], jnp.int32(config.prompt), config.model)[0]]

    pairs = zip(logits(params), logits(jaxvq.dequantize_params(params)), strict=True)
    return max(float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)) for got, wanted in pairs)


def against(row: Row, reference: Row, config: Config) -> Row:
    """A row's ratios to the reference, and whether they reach the targets."""
    speed = row["tokens_per_second"] / reference["tokens_per_second"]
    memory = row["program_nbytes"] / reference["program_nbytes"]
    ratios = {"speed_ratio": speed, "memory_ratio": memory}
    if row["contender"] not in config.judged:
        return ratios
    return ratios | {"reached": {"speed": speed >= config.faster, "memory": memory <= config.smaller}}


def check(rows: list[Row], config: Config) -> None:
    """Raises RuntimeError for a contender that does not compute what its weights say."""
    for row in rows:
        error = row["relative_error"]
        if not row["finite"] or (error is not None and not error < config.largest_error):
            raise RuntimeError(
                f"{row['contender']}: the logits must be finite and within {config.largest_error:g} of those of the "
                f"decoded weights, got finite: {row['finite']}, error: {error}; the times mean nothing"
            )


def summary(row: Row) -> str:
    error = row["relative_error"]
    against = "" if error is None else f", logits within {error:.1e} of those of the decoded weights"
    return (
        f"{row['contender']}: made in {row['build_seconds']:.1f} s, {row['tokens_per_second']:,.0f} tokens/s{against}"
    )


def verdict(row: Row, config: Config) -> str:
    speed, memory = ("yes" if row["reached"][what] else "NO" for what in ("speed", "memory"))
    return (
        f"{row['contender']}: {row['speed_ratio']:.2f} times the tokens per second, at least {config.faster}: {speed}; "
        f"{row['memory_ratio']:.3f} times the memory, at most {config.smaller}: {memory}"
    )


def as_table(rows: list[Row], config: Config, device: str) -> Table:
    title = f"greedy decoding at batch 1, {config.model.layers} layers of width {config.model.width}, {device}"
    first = Column("weights", no_wrap=True)
    heads = ("bits", "MB", f"x {REFERENCE}", "ms", "floor", "tokens/s", f"x {REFERENCE}")
    columns = (first, *(Column(head, justify="right", no_wrap=True) for head in heads))
    table = Table(*columns, title=title, box=rich.box.SIMPLE_HEAD, collapse_padding=True)
    table.caption = f"floor: ms for the weights' bytes alone at {config.bandwidth / 1e12:g} TB/s"
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['program_nbytes'] / 1e6:,.4g}",
            f"{row['memory_ratio']:.3f}",
            f"{row['milliseconds']:.3f}",
            f"{row['floor_milliseconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed_ratio']:.2f}",
        )
    return table


def draw(rows: list[Row], config: Config, device: str) -> None:
    """Tokens per second and memory, a bar for each contender, and where the targets lie."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 0.42 * len(rows) + 1.9), sharey=True)
    colors = ["0.6" if row["contender"] == REFERENCE else "tab:blue" for row in rows]
    names = [row["contender"] for row in rows]
    panels = (
        (speed, [row["tokens_per_second"] for row in rows], "speed_ratio", config.faster, ",.0f"),
        (memory, [row["program_nbytes"] / 1e6 for row in rows], "memory_ratio", config.smaller, ",.4g"),
    )
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 0}
    for axes, values, ratio, target, form in panels:
        # The time of a tiny model on a busy machine is noise: the difference of two runs may even be negative.
        bars = [max(value, 0) for value in values]
        axes.barh(names, bars, color=colors)
        for place, (row, value, bar) in enumerate(zip(rows, values, bars, strict=True)):
            label = f" {value:{form}} ({row[ratio]:.2f}x)"
            axes.text(bar, place, label, va="center", fontsize=9, bbox=plain, in_layout=False)
        axes.axvline(target * values[0], color="tab:red", linestyle="--", linewidth=1)
        axes.set_xlim(0, 1.3 * max(*bars, 1e-9))
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_xlabel(f"tokens per second, batch 1; dashed: {config.faster} x {REFERENCE}, the target at 4 bits")
    memory.set_xlabel(f"MB on the device while decoding; dashed: {config.smaller} x {REFERENCE}")
    speed.invert_yaxis()
    count = f"{rows[0]['weights'] / 1e9:.2f} billion" if rows[0]["weights"] >= 1e8 else f"{rows[0]['weights']:,}"
    figure.suptitle(f"Greedy decoding with {count} weights, {device}", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(config.out / "bench_decode.png", dpi=120)
    plt.close(figure)


def cli(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few seconds")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=METHODS, help=f"of {', '.join(METHODS)}")
    parser.add_argument("--fitted", type=int, metavar="LAYERS", help="quantize only so many layers, at least 1")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", default=Config.out)
    given = parser.parse_args(arguments)
    config = SMOKE if given.smoke else Config()
    changes = {"contenders": given.only, "fitted": given.fitted}
    changes = {name: value for name, value in changes.items() if value is not None}
    return main(dataclasses.replace(config, out=given.out, **changes))


if __name__ == "__main__":
    cli()
