"""The table and the charts of `experiments/bench_kmeans.py`."""

from collections.abc import Iterable
from typing import Any

import matplotlib.figure
import rich.box
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
OURS, THEIRS, LIMIT = "tab:blue", "0.45", "tab:red"
MARKERS = ("o", "s", "^", "D")
SHORT = {
    "time_ratio": "time ratio",
    "distortion_ratio": "error ratio",
    "optimum_ratio": "error/optimum",
    "compile_seconds": "seconds of compilation",
    "seconds": "seconds",
    "fit_palettes_programs": "palette programs",
    "fit_product_programs": "product programs",
}


def show(console: Console, rows: list[Row]) -> None:
    """One problem's rows, and below them what the targets came to."""
    title = ", ".join(dict.fromkeys(row["problem"] for row in rows))
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("contender")
    for heading in ("ms/iter.", "call, s", "first, s", "ratio", "error", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = (
            number(row.get("iteration_seconds"), ".3g", 1e3),
            number(row.get("seconds"), ".3g"),
            number(row.get("first_seconds"), ".2f"),
            number(row.get("time_ratio"), ".3f"),
            number(row.get("distortion"), ".4g"),
            number(row.get("distortion_ratio"), ".4f"),
        )
        table.add_row(row["contender"], *numbers)
    console.print(table)
    for row in rows:
        for text in remarks(row):
            console.print(f"{row['contender']}: {text}", soft_wrap=True, markup=False, highlight=False)


def number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(scale * value, form)


def remarks(row: Row) -> Iterable[str]:
    """What the numbers do not say: a failure, each target, the limit, the imports."""
    if row.get("failed"):
        yield row["failed"]
    for target in row.get("targets", ()):
        met = {True: "met", False: "MISSED", None: "not known"}[target["met"]]
        got = number(target["got"], ".4g")
        yield f"{SHORT[target['quantity']]} {got} of at most {target['most']:g}: {met}"
    if row.get("limits"):
        parts = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in row["limits"].items())
        yield f"limits: {parts}; {number(row['times_limit'], '.3g')} x {row['limited_by']}"
    if "import_seconds" in row:
        yield f"imports {row['import_seconds']:.2f} s; the call took {row['cpu_seconds']:.1f} s of processor time"


def compared(row: Row) -> float | None:
    """The time that is compared, in seconds."""
    return None if row.get("failed") else row.get(row.get("compares", "seconds"))


def finding(rows: list[Row]) -> str:
    """The outcome in a line: how the judged rows compare, and how many targets are met."""
    targets = [target for row in rows for target in row.get("targets", ())]
    judged = [target for target in targets if target["met"] is not None]
    met = sum(target["met"] for target in judged)
    texts = []
    ratios = [row["time_ratio"] for row in rows if row.get("judged") and row.get("time_ratio") is not None]
    if ratios:
        span = f"{min(ratios):.2g}" if len(ratios) == 1 else f"{min(ratios):.2g} to {max(ratios):.2g}"
        texts.append(f"jaxvq takes {span} times as long as its rivals")
    texts.append(f"{met} of {len(judged)} targets met" if judged else "nothing to compare with")
    return "; ".join(texts)


def draw_race(rows: list[Row], device: str) -> matplotlib.figure.Figure:
    """A panel per problem, a line per contender: its time on a log scale, its error as a label."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    parts = [
        [row for row in rows if row["problem"] == name and row.get("distortion_only") is None] for name in problems
    ]
    parts = [[row for row in part if compared(row) is not None or row.get("failed")] for part in parts]
    heights = [max(len(part), 1) + 1.3 for part in parts]
    figure = matplotlib.figure.Figure(figsize=(10.5, 0.33 * sum(heights) + 1.4), layout="constrained")
    panels = figure.subplots(len(problems), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    times = [1e3 * time for row in rows if (time := compared(row)) is not None]
    for axes, name, part in zip(panels, problems, parts, strict=True):
        draw_problem(axes, name, part)
    if times:
        least, most = min([*times, *lowest_limits(rows)]), max(times)
        panels[0].set_xscale("log")
        panels[0].set_xlim(least / 2, most * max(30, (most / least) ** 0.6))  # room for the labels
    panels[-1].set_xlabel("milliseconds (log scale), medians; after compilation unless said otherwise")
    figure.suptitle(f"{shown_as(device)}: {finding(rows)}", fontsize=11)
    return figure


def shown_as(device: str) -> str:
    return "CPU" if device == "cpu" else device


def lowest_limits(rows: list[Row]) -> list[float]:
    return [1e3 * row["limits"][row["limited_by"]] for row in rows if row.get("limits") and not row.get("failed")]


def draw_problem(axes: Axes, name: str, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        colour = OURS if row["contender"].startswith("jaxvq") else THEIRS
        time = compared(row)
        if time is None:
            axes.text(0.01, place, row["failed"][:90], transform=axes.get_yaxis_transform(), va="center", fontsize=8)
            continue
        axes.plot(1e3 * time, place, "o", color=colour)
        axes.annotate(
            label(row, time), (1e3 * time, place), (8, 0), textcoords="offset points", va="center", fontsize=8
        )
        if row.get("limits"):
            least = 1e3 * row["limits"][row["limited_by"]]
            axes.plot([least, 1e3 * time], [place, place], color=LIMIT, linewidth=1, linestyle=":", zorder=0)
            axes.plot(least, place, "|", color=LIMIT, markersize=11, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [row["contender"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    whole = "one iteration" if any(row.get("compares") == "iteration_seconds" for row in rows) else "one call"
    if any("import_seconds" in row for row in rows):
        whole = "one call, compilation included"
    limited = next((row["limited_by"] for row in rows if row.get("limits")), None)
    note = "" if limited is None else f"; red: what {limited} take{'s' if limited == 'argmin' else ''} at least"
    axes.set_title(f"{name}: {whole}{note}", loc="left", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def label(row: Row, time: float) -> str:
    """Time, its ratio and the error's, as far as they are known."""
    text = f"{time:.3g} s" if time >= 1 else f"{1e3 * time:.3g} ms"
    if row.get("time_ratio") is not None and row["time_ratio"] != 1:
        text += f", {row['time_ratio']:.2g} x rival"
    if row.get("distortion_ratio") is not None:
        text += f", error {row['distortion_ratio']:.4f}"
    if row.get("compares") == "seconds" and row.get("iteration_seconds") is not None:
        text += f" ({row['iterations']} iterations, {1e3 * row['iteration_seconds']:.3g} ms each)"
    programs = [row.get(f"{name}_programs") for name in ("fit_palettes", "fit_product")]
    return text if programs[0] is None else f"{text}, {programs[0]} + {programs[1]} clustering programs compiled"


def draw_scaling(rows: list[Row], device: str) -> matplotlib.figure.Figure:
    """Time per iteration against the points and against the entries, on log scales."""
    figure = matplotlib.figure.Figure(figsize=(10.5, 4.6), layout="constrained")
    fixed = {"points": "entries", "entries": "points"}
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axes, axis in zip(figure.subplots(1, 2, sharey=True), fixed, strict=True):
        part = [row for row in rows if row.get("axis") == axis and row.get("iteration_seconds") is not None]
        for name, marker in zip(names, MARKERS, strict=False):
            line = [row for row in part if row["contender"] == name]
            colour = OURS if name.startswith("jaxvq") else THEIRS
            times = [1e3 * row["iteration_seconds"] for row in line]
            if line:
                axes.plot([row[axis] for row in line], times, marker=marker, color=colour, label=name)
        limited = [row for row in part if row.get("limits")]
        if limited:
            least = [1e3 * row["limits"][row["limited_by"]] for row in limited]
            axes.plot([row[axis] for row in limited], least, ":", color=LIMIT, label="the chip's limit")
        axes.set_xlabel(f"{axis} (log scale)")
        others = fixed[axis]
        if part:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{others}: {part[0][others]:,}, d={part[0]['dim']}", fontsize=10)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("milliseconds per Lloyd iteration (log scale)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"{shown_as(device)}: {scaling_finding(rows)}".replace("; ", ";\n"), fontsize=11)
    return figure


def scaling_finding(rows: list[Row]) -> str:
    """How the ratio of the times changes from the smallest to the largest number of points and of entries."""
    texts = []
    for axis in ("points", "entries"):
        line = [row for row in rows if row.get("axis") == axis and row.get("judged")]
        line = [row for row in line if row.get("time_ratio") is not None]
        if line:
            first, last = line[0], line[-1]
            span = f"{first['time_ratio']:.2g} to {last['time_ratio']:.2g}"
            texts.append(f"{span} from {first[axis]:,} to {last[axis]:,} {axis}")
    rivals = [name for name in dict.fromkeys(row["contender"] for row in rows) if not name.startswith("jaxvq")]
    if not texts or not rivals:
        return "time of a Lloyd iteration by points and by entries"
    return f"jaxvq's time as a ratio to that of {rivals[0]}: {'; '.join(texts)}"
