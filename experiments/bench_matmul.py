"""How fast a product with a quantized weight is, beside the same product in bf16 and those of other packages.

    python -m experiments.bench_matmul [--smoke] [--only NAME ...] [--rows N ...] [--out FOLDER]

Claim: on one NVIDIA H200 a compressed matrix is the fast one. With 4-bit palettes and one row, a product takes 1 / 2.3
of the time of bf16, 1 / 2.5 with 3-bit palettes, half with 2-bit codebooks; 2048 rows lose at most 15%; and the error
is that of rounding to bf16.

A turn multiplies the same x with 48 different weights, more of them if they are small, so that none is still in the
cache when its turn comes. Each product stays one by itself: of two weights with the same x XLA would else make one
product, if they are small. Many turns with changing x are one program, which runs each turn as one CUDA graph. The
contenders' programs run by turns, each time in another order, so that none always follows a light one when the GPU is
at its power limit. The median time of a program over its products is the time. That of the loop itself, without
products, is shown beside it and not subtracted. What PyTorch runs is recorded as CUDA graphs and timed by events, in a
process of its own before all others. A package that is missing is named and left out.
"""

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import rich.box
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table

from experiments.matmul_contenders import (
    CONTENDERS,
    PEERS,
    REFERENCES,
    Row,
    Run,
    compiled,
    find_peers,
    launches,
    nbytes_of,
    peer_seconds,
    take_turn,
    why_not,
)
from experiments.settled import settle

KERNEL = "__gpu$xla.gpu.ptx"
OURS, THEIRS = ("tab:blue", "#9ecae1"), ("0.65", "0.85")


@dataclasses.dataclass(frozen=True)
class Target:
    """`contender` is to be at least `least` times as fast as `rival`."""

    contender: str
    least: float
    rival: str = "bf16"


@dataclasses.dataclass(frozen=True)
class Case:
    """Products `[rows, inputs] @ [inputs, outputs]`, `turns` turns of all weights in one program."""

    inputs: int
    outputs: int
    rows: int
    turns: int
    targets: tuple[Target, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """That of the weight."""
        return self.inputs, self.outputs


PALETTES_4 = ("palette4", "palette4-int8")
ONE_ROW = (
    *(Target(name, 2.3) for name in PALETTES_4),
    *(Target(name, 1.0, "torchao-int4") for name in PALETTES_4),
    Target("palette3", 2.5),
    Target("residual-2x8", 2.0),
    Target("product-12", 1.8),
)
FEW_ROWS = tuple(Target(name, 1.8) for name in PALETTES_4)
FAST = (*PALETTES_4, "palette3", "palette2", "residual-2x8", "product-12", "affine4", "affine8")
MANY_ROWS = tuple(Target(name, 0.85) for name in FAST)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is multiplied.

    Attributes:
      cases: shapes and targets.
      contenders: which of `CONTENDERS`; bf16 is always among them.
      peers: which of `PEERS`.
      weights: at least so many take turns, which keeps the loop's part of the time small,
      working_nbytes: and at least so many bytes of them: twice the cache.
      inputs: different x.
      repeats: timed runs of each program.
      columns: of the result that are compared with the float64 product.
      bandwidth: bytes per second that the device's memory can deliver, for the floor.
      largest_error: relative to the float64 product.
      seed: of weights and inputs.
      out: the folder for chart and results.
    """

    cases: tuple[Case, ...] = (
        Case(4096, 14336, 1, 50, ONE_ROW),
        Case(4096, 14336, 16, 50, FEW_ROWS),
        Case(4096, 14336, 128, 25),
        Case(4096, 14336, 2048, 2, MANY_ROWS),
        Case(4096, 4096, 1, 125, ONE_ROW),
        Case(4096, 4096, 16, 125, FEW_ROWS),
        Case(4096, 4096, 128, 50),
        Case(4096, 4096, 2048, 5, MANY_ROWS),
    )
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    peers: tuple[str, ...] = tuple(PEERS)
    weights: int = 48
    working_nbytes: float = 100e6
    inputs: int = 4
    repeats: int = 7
    columns: int = 64
    bandwidth: float = 4.8e12
    largest_error: float = 4e-3
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/bench_matmul")

    def only(self, names: list[str] | None, rows: list[int] | None) -> "Config":
        """Nothing but these contenders and bf16, and nothing but the cases of so many rows; None for all."""
        config = self
        if names is not None:
            config = dataclasses.replace(
                self,
                contenders=tuple(name for name in CONTENDERS if name in (*REFERENCES, *names)),
                peers=tuple(name for name in PEERS if name in names),
            )
        if rows is None:
            return config
        there = sorted({case.rows for case in self.cases})
        if unknown := sorted(set(rows) - set(there)):
            raise ValueError(f"`--rows` must be of {there}, got {unknown}")
        return dataclasses.replace(config, cases=tuple(case for case in self.cases if case.rows in rows))

    def in_turn(self, nbytes: int) -> int:
        """How many weights of so many bytes take turns."""
        return max(self.weights, -(-int(self.working_nbytes) // nbytes))


SMOKE = Config(
    cases=(Case(256, 128, 1, 3, (Target("palette4-xla", 0.01),)), Case(256, 128, 16, 3)),
    contenders=("bf16", "palette4-xla"),
    peers=(),
    working_nbytes=0,
    repeats=2,
)


def main(config: Config) -> dict[str, Any]:
    """Measures every case; returns `{"config", "device", "rows"}`, written after each case and drawn."""
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    theirs = rows_of_peers(config, console)
    device = jax.local_devices()[0].device_kind
    found = {"config": dataclasses.asdict(config) | {"out": str(config.out)}, "device": device, "rows": []}
    for shape in dict.fromkeys(case.shape for case in config.cases):
        weights = {name: make_weights(name, shape, config) for name in config.contenders}
        for case in [case for case in config.cases if case.shape == shape]:
            rows = [run.row for run in race(case, weights, config, console)]
            rows += theirs[case]
            compare(rows, case, config)
            found["rows"] += rows
            (config.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
            show(console, rows, case, config)
    console.print(finding(found["rows"]))
    draw(found["rows"], device, config).savefig(config.out / "bench_matmul.png", dpi=120)
    console.print(f"written to {config.out}")
    return found


def rows_of_peers(config: Config, console: Console) -> dict[Case, list[Row]]:
    """Those of other packages, which run in a process of their own: beside them JAX's kernels might start later."""
    reasons: list[str] = []
    rows: dict[Case, list[Row]] = {case: [] for case in config.cases}
    if config.peers:
        with console.status("packages for PyTorch: timing"):
            try:
                reasons, rows = apart(race_of_peers, config)
            except BrokenProcessPool:
                reasons = ["the process of the packages for PyTorch has ended early; they are left out"]
    for reason in reasons:
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    return rows


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def race_of_peers(config: Config) -> tuple[list[str], dict[Case, list[Row]]]:
    """Why packages are left out, and the rows of the others."""
    reasons: list[str] = []
    peers = find_peers(config.peers, reasons.append)
    return reasons, {case: [peer_row(name, peers[name], case, config) for name in peers] for case in config.cases}


def make_weights(name: str, shape: tuple[int, int], config: Config) -> list[Any]:
    """As many different weights as take turns."""
    make = jax.jit(CONTENDERS[name].make, static_argnums=(1, 2))
    key = jax.random.key(config.seed)
    count = config.in_turn(nbytes_of(jax.eval_shape(lambda key: CONTENDERS[name].make(key, *shape), key)))
    return [make(jax.random.fold_in(key, index), *shape) for index in range(count)]


def race(case: Case, weights: dict[str, list[Any]], config: Config, console: Console) -> list[Run]:
    """Compiles all programs, then runs them by turns; the last run is the loop without products."""
    xs = jax.random.normal(jax.random.key(config.seed + 1), (config.inputs, case.rows, case.inputs), jnp.bfloat16)
    runs = [Run(first_row(name, case, nbytes_of(made[0])), case.turns, made) for name, made in weights.items()]
    text = f"{case.rows} rows, {case.inputs} x {case.outputs}"
    for run in track(runs, f"{text}: compiling", console=console, transient=True):
        run.guarded(prepare, xs, config)
    loop = Run({"contender": "loop"}, case.turns, [])
    loop.program = compiled(lambda x, w: x, loop, xs)
    settle()
    orders = np.random.default_rng(config.seed)
    for _ in track(range(config.repeats + 1), f"{text}: timing", console=console, transient=True):
        for index in orders.permutation(len(runs) + 1):
            (*runs, loop)[index].guarded(take_turn, xs)
    for run in (*runs, loop):
        run.program = None  # it holds memory of the device
        if "failed" not in run.row:
            run.row["turn_microseconds"] = 1e6 * statistics.median(run.seconds[1:]) / case.turns  # the first warms up
    for run in runs:
        if "failed" not in run.row:
            run.row["microseconds"] = run.row["turn_microseconds"] / len(run.weights)
            run.row["loop_microseconds"] = loop.row["turn_microseconds"] / len(run.weights)
    return runs


def first_row(name: str, case: Case, nbytes: int | None = None) -> Row:
    row: Row = {"contender": name, "title": (CONTENDERS.get(name) or PEERS[name]).title}
    row |= {"inputs": case.inputs, "outputs": case.outputs, "rows": case.rows}
    if nbytes is not None:
        row |= {"nbytes": nbytes, "bits_per_weight": 8 * nbytes / (case.inputs * case.outputs)}
    return row


def prepare(run: Run, xs: Float[Array, "n rows in"], config: Config) -> None:
    """Compiles one product, which tells the error and the kernels, and the loop of many."""
    contender = CONTENDERS[run.row["contender"]]
    began = time.perf_counter()
    product = jax.jit(contender.product).lower(xs[0], run.weights[0]).compile()
    program = run.program = compiled(contender.product, run, xs)
    text = product.as_text() or ""
    columns = np.linspace(0, run.row["outputs"] - 1, config.columns).astype(np.int32)
    run.row |= {
        "compile_seconds": time.perf_counter() - began,
        "weights": len(run.weights),
        "kernel": KERNEL in text,
        "launches": launches(text),
        "turn_launches": launches(program.as_text() or ""),
    }
    exact = np.asarray(xs[0], np.float64) @ np.asarray(contender.columns(run.weights[0], columns), np.float64)
    got = np.asarray(product(xs[0], run.weights[0])[:, columns], np.float64)
    run.row["relative_error"] = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def peer_row(name: str, modules: list[Any], case: Case, config: Config) -> Row:
    """The row of another package's product; one that says so if it fails."""
    shape = case.rows, case.inputs, case.outputs
    try:
        seconds, nbytes, weights = peer_seconds(
            PEERS[name], modules, shape, count=config.in_turn, turns=case.turns, repeats=config.repeats
        )
    except Exception as error:  # whatever goes wrong in one package, the others go on
        return first_row(name, case) | {"failed": f"failed: {why_not(error)}"}
    return first_row(name, case, nbytes) | {"weights": weights, "microseconds": 1e6 * seconds}


def compare(rows: list[Row], case: Case, config: Config) -> None:
    """Adds to the rows what follows from their times: ratios, and whether targets are met."""
    times = {row["contender"]: row["microseconds"] for row in rows if "microseconds" in row}
    references = [times[name] for name in REFERENCES if name in times]
    if references:
        times["bf16"] = min(references)
    for row in rows:
        name = row["contender"]
        if "microseconds" in row:
            floor = 1e6 * row["nbytes"] / config.bandwidth
            row["floor_microseconds"] = floor
            row["times_floor"] = row["microseconds"] / floor
            row["tbytes_per_second"] = row["nbytes"] / row["microseconds"] / 1e6
            row["speed"] = ratio(times.get("bf16"), row["microseconds"])
        row["targets"] = []
        for target in case.targets:
            if target.contender == name:
                got = ratio(times.get(target.rival), times.get(name))
                met = None if got is None else got >= target.least
                row["targets"].append({"rival": target.rival, "least": target.least, "got": got, "met": met})
        if name in CONTENDERS and CONTENDERS[name].judged and "relative_error" in row:
            got = row["relative_error"]
            row["targets"].append({"most": config.largest_error, "got": got, "met": got < config.largest_error})


def ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value / other


def show(console: Console, rows: list[Row], case: Case, config: Config) -> None:
    """The rows of a case, and below them what the targets came to."""
    title = escape(f"[{case.rows}, {case.inputs}] @ [{case.inputs}, {case.outputs}]")
    heads = ("bits", "us", "TB/s", "x bf16", "x floor", "error", "kernels")
    columns = (Column(head, justify="right", no_wrap=True) for head in heads)
    first = Column("weight", no_wrap=True)
    table = Table(first, *columns, title=title, box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    loops = [row["loop_microseconds"] for row in rows if "loop_microseconds" in row]
    loop = f"; the loop alone: {max(loops):.2f} us a product" if loops else ""
    table.caption = f"floor: the weight's bytes at {config.bandwidth / 1e12:g} TB/s{loop}"
    forms = {"bits_per_weight": ".2f", "microseconds": ".2f", "tbytes_per_second": ".2f", "speed": ".2f"}
    forms |= {"times_floor": ".2f", "relative_error": ".1e"}
    for row in rows:
        kernels = f"{row['launches']} {'own' if row['kernel'] else 'XLA'}" if "launches" in row else ""
        table.add_row(escape(row["title"]), *(number(row.get(name), form) for name, form in forms.items()), kernels)
    console.print(table)
    for row in rows:
        for text in remarks(row):
            console.print(f"{row['title']}: {text}", soft_wrap=True, markup=False, highlight=False)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def remarks(row: Row) -> list[str]:
    """What the numbers do not say: a failure, each target but for an error that is as small as it should be."""
    texts = [row["failed"]] if "failed" in row else []
    for target in row["targets"]:
        met = {True: "met", False: "MISSED", None: "not known"}[target["met"]]
        if "least" not in target:
            texts += [f"error {target['got']:.1e}, under {target['most']:g}: {met}"] * (not target["met"])
        else:
            got = number(target["got"], ".2f")
            texts.append(f"{got} times as fast as {target['rival']} of at least {target['least']:g}: {met}")
    return texts


def finding(rows: list[Row]) -> str:
    """The outcome in a line."""
    judged = [target for row in rows for target in row["targets"] if target["met"] is not None]
    best = [row for row in rows if row["contender"] in PALETTES_4 and row.get("speed") and row["rows"] == 1]
    met = f"{sum(target['met'] for target in judged)} of {len(judged)} targets met"
    if not best:
        return met
    least, most = (f"{way(row['speed'] for row in best):.2f}" for way in (min, max))
    speeds = least if least == most else f"{least} to {most}"
    return f"4-bit palettes at one row are {speeds} times as fast as bf16; {met}"


def draw(rows: list[Row], device: str, config: Config) -> matplotlib.figure.Figure:
    """A panel per number of rows, a group of bars per contender: its speed for each shape of weight."""
    titles = {row["contender"]: row["title"] for row in rows if "speed" in row}
    names = [name for name in (*CONTENDERS, *PEERS) if name in titles]
    counts = list(dict.fromkeys(case.rows for case in config.cases))
    size = (max(9.0, 2.6 + 2.9 * len(counts)), 0.42 * len(names) + 2.0)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        draw_panel(axes, [row for row in rows if row["rows"] == count and row.get("speed")], names)
        axes.set_title(f"{count} row{'s' * (count > 1)}", loc="left", fontsize=10)
    panels[0].set_yticks(range(len(names)), [titles[name] for name in names], fontsize=9)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    shapes = ", then ".join(dict.fromkeys(f"{case.inputs} x {case.outputs}" for case in config.cases))
    note = f"black: the weight's bytes at {config.bandwidth / 1e12:g} TB/s, in figures where it is beyond the axis"
    what = f"speed of x @ w against bf16, w {shapes}"
    figure.supxlabel(f"{what}\nblue: kernels of jaxvq; red: target; {note}", fontsize=9)
    figure.suptitle(f"{device}: {finding(rows)}", fontsize=11)
    return figure


def draw_panel(axes: Axes, rows: list[Row], names: list[str]) -> None:
    shapes = list(dict.fromkeys((row["inputs"], row["outputs"]) for row in rows))
    height = 0.8 / max(1, len(shapes))
    limit = 1.5 * max([1.0, *(row["speed"] for row in rows)])
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.axvline(1, color="0.4", linewidth=0.8, zorder=0)
    for row in rows:
        index = shapes.index((row["inputs"], row["outputs"]))
        place = names.index(row["contender"]) + height * (index - (len(shapes) - 1) / 2)
        colour = (OURS if row.get("kernel") else THEIRS)[index % 2]
        axes.barh(place, row["speed"], 0.95 * height, color=colour)
        axes.text(row["speed"] + limit / 50, place, f"{row['speed']:.2f}", va="center", fontsize=7, bbox=plain)
        floor = row["speed"] * row["times_floor"]
        marks = [(target["least"], "tab:red") for target in row["targets"] if target.get("rival") == "bf16"]
        for at, mark in [(floor, "black"), *marks]:
            if at <= limit:
                axes.plot([at, at], [place - height / 2, place + height / 2], color=mark, linewidth=1.5)
        if limit < floor:
            axes.text(limit, place, f"{floor:.3g} \N{RIGHTWARDS ARROW}", va="center", ha="right", fontsize=7)
    axes.set_xlim(0, limit)
    axes.spines[["top", "right"]].set_visible(False)


def cli(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes without kernels, a few seconds, on any device"
    )
    every = (*CONTENDERS, *PEERS)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=every, help=f"bf16 and of {', '.join(every)}")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="only the cases with so many rows of x")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", default=Config.out)
    given = parser.parse_args(arguments)
    if not given.smoke and jax.default_backend() != "gpu":
        parser.error("an NVIDIA GPU is needed, and jax sees none; --smoke runs anywhere")
    try:
        config = (SMOKE if given.smoke else Config()).only(given.only, given.rows)
    except ValueError as error:
        parser.error(str(error))
    return main(dataclasses.replace(config, out=given.out))


if __name__ == "__main__":
    cli()
