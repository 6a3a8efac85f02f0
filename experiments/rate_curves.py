"""What `mnist_rates` found, as curves of accuracy against size, tables and figures."""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.axes
import matplotlib.figure
import numpy as np
import rich.table
from matplotlib.ticker import LogLocator

FLOAT, SCALAR, VECTOR, ROWS = "float", "single values", "vectors", "rows"
EVERY_LAYER, ALL_BUT_LAST = "rows, every layer", "rows, last layer whole"
SMALL = "vectors, centroids quantized"
CURVES = (SCALAR, VECTOR, SMALL)
COLOURS = {SCALAR: "tab:blue", VECTOR: "tab:green", SMALL: "tab:red"}
COLOURS |= {EVERY_LAYER: "tab:purple", ALL_BUT_LAST: "tab:orange"}
PUBLISHED = {"float": 96.68, "w4a4": 97.77, "rows": 98.21}  # percent
PUBLISHED_LOSSES = (None, 0.0736, 0.0088)  # before W4A4 and before row VQ
LOST = 0.01  # the accuracy that may be lost where the smallest size is asked for
TICKS, FINE_TICKS = (10, 50, 80, 90, 95, 97, 98), (80, 90, 93, 95, 96, 97, 97.5, 98, 98.5)
CEILING = 98.8  # percent; the axis of accuracy is stretched towards it

Row = dict[str, Any]


def curve(found: Sequence[Row], kind: str) -> list[Row]:
    """The ways of a kind, smallest first, that nothing as small or smaller beats on the held-out images."""
    points = [row for row in found if row["kind"] == kind]
    if kind == SMALL:
        vectors = [(row, small) for row in found if row["kind"] == VECTOR for small in row["centroids"]]
        points = [{**row, **small, "label": f"{row['label']}, {small['stored']}"} for row, small in vectors]
    points.sort(key=lambda row: (row["nbytes"], -np.mean(row["held_out"])))
    best = list(itertools.accumulate((np.mean(row["held_out"]) for row in points), max, initial=-1.0))
    return [row for row, before in zip(points, best[:-1], strict=True) if np.mean(row["held_out"]) > before]


def smallest_sizes(found: Sequence[Row]) -> dict[str, Row | None]:
    """For each kind the smallest that loses at most a point against float on held-out images; None where none does."""
    floats = next(row for row in found if row["kind"] == FLOAT)
    least = np.mean(floats["held_out"]) - LOST
    near = {kind: [row for row in curve(found, kind) if np.mean(row["held_out"]) >= least] for kind in CURVES}
    return {kind: rows[0] if rows else None for kind, rows in near.items()}


def tables(results: dict[str, Any]) -> tuple[rich.table.Table, ...]:
    """The published set-up, the grid, and the ways to store centroids."""
    found = results["rows"]
    return _printed_table(results["printed"]), _rates_table(found, results["trainings"]), _centroid_table(found)


def _printed_table(printed: dict[str, Any]) -> rich.table.Table:
    """The published numbers and those of the set-up as it was printed."""
    table = rich.table.Table(title="The published set-up, on all training images", box=None, title_justify="left")
    for heading in ("", "published", "got"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for epochs, accuracy, loss in zip(printed["epochs"], printed["float"], PUBLISHED_LOSSES, strict=True):
        published = f"{PUBLISHED['float']:.2f}%" if loss is None else ""
        table.add_row(f"float, {epochs} epochs", published, percent(accuracy))
        losses = printed["losses"][epochs - 1]
        mean = f"{np.mean(losses):.4f} ± {np.std(losses):.4f}"
        table.add_row("  mean training loss", "" if loss is None else f"{loss:.4f}", mean)
    table.add_row("W4A4", f"{PUBLISHED['w4a4']:.2f}%", percent(printed["w4a4"]))
    table.add_row(f"row VQ, 10% of the {EVERY_LAYER}", f"{PUBLISHED['rows']:.2f}%", percent(printed["rows"]))
    table.add_row("  images of the class with the largest bias", "", percent(printed["share"]))
    table.add_row("  its logits differ, but for the bias, by", "", f"{max(printed['spread']):g}")
    return table


def _rates_table(found: Sequence[Row], trainings: dict[str, str]) -> rich.table.Table:
    """A row for each way."""
    chosen = "; ".join(f"{kind}: {training}" for kind, training in trainings.items())
    table = rich.table.Table(
        caption="Everything is counted: codes, codebooks, scales, biases. Percent of the images that are right: images "
        "held out of training, test images right after quantization, and after codebooks were trained, by which "
        f"held-out images chose ({chosen}). Bold: on the curve of its kind.",
        caption_justify="left",
        box=None,
    )
    for heading in ("first layer", "rate", "kB", "held out", "before", "after"):
        table.add_column(heading, justify="left" if heading == "first layer" else "right", no_wrap=True)
    best = [id(row) for kind in (SCALAR, VECTOR) for row in curve(found, kind)]
    for row in found:
        means = (f"{100 * np.mean(row[name]):.2f}" for name in ("held_out", "before"))
        cells = (row["family"], row["label"], f"{row['nbytes'] / 1000:.1f}", *means, percent(row["accuracy"]))
        table.add_row(*cells, style="bold" if id(row) in best else None)
    return table


def _centroid_table(found: Sequence[Row]) -> rich.table.Table:
    """Size and accuracy of the vector methods for each way to store centroids."""
    ways = [row for row in found if row["centroids"]]
    caption = "Test accuracy in percent and size in kB by how centroids are stored: as trained, and in fewer bytes."
    table = rich.table.Table(caption=caption, caption_justify="left", box=None)
    for heading in ("vectors", "rate", "float32", *(small["stored"] for row in ways[:1] for small in row["centroids"])):
        table.add_column(heading, justify="left" if heading == "vectors" else "right", no_wrap=heading == "vectors")
    for row in ways:
        cells = (f"{100 * np.mean(one['accuracy']):.2f}  {one['nbytes'] / 1000:.1f}" for one in _stored(row))
        table.add_row(row["family"], row["label"], *cells)
    return table


def percent(accuracies: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies):.2f}%"


def draw_rates(results: dict[str, Any]) -> matplotlib.figure.Figure:
    """Accuracy against size: a point for each way, and the curve of each kind."""
    found, smallest = results["rows"], results["smallest"]
    figure = matplotlib.figure.Figure(figsize=(12, 7), layout="constrained")
    axes = figure.add_subplot()
    markers: dict[str, str] = {}
    for kind in CURVES:
        points, colour, small = curve(found, kind), COLOURS[kind], kind == SMALL
        style: Any = {"color": colour, "linestyle": "--" if small else "-", "marker": "." if small else ""}
        axes.plot(*_coordinates(points), label=f"{kind}: the best at its size", zorder=1, **style)
        for row in (row for row in found if row["kind"] == kind):
            family = row["family"]
            label = "" if family in markers else family
            marker = markers.setdefault(family, "osD^vPX*h"[len(markers)])
            style = {"color": colour, "marker": marker, "markerfacecolor": colour if row in points else "white"}
            axes.errorbar(*_coordinates([row]), 100 * np.std(row["accuracy"]), fmt=" ", capsize=3, label=label, **style)
            _label(axes, row, (4, 4) if kind == VECTOR else (4, -10), colour)
    _float_line(axes, found)
    _size_axis(axes)
    _accuracy_axis(axes, results["dataset"])
    sizes = {kind: f"{row['nbytes'] / 1000:.1f} kB" if row else "more" for kind, row in smallest.items()}
    axes.set_title(
        f"{results['dataset']}: {100 * LOST:g} point below float takes {sizes[SCALAR]} of single values, "
        f"{sizes[VECTOR]} of vectors,\nand {sizes[SMALL]} of vectors whose centroids are quantized in turn"
    )
    figure.legend(loc="outside right upper", frameon=False)
    figure.supxlabel(
        f"Means of {results['seeds']} seeds and their standard deviation. Filled, and on the curves: nothing as small "
        "is better on held-out images. Second and third layer: 4-bit palettes.",
        fontsize="small",
    )
    return figure


def draw_rows(results: dict[str, Any]) -> matplotlib.figure.Figure:
    """Accuracy against the fraction of rows, and what the centroids' bytes are worth."""
    found, dataset = results["rows"], results["dataset"]
    figure = matplotlib.figure.Figure(figsize=(16, 7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    _draw_fractions(left, found)
    _draw_centroids(right, found)
    _float_line(left, found)
    _accuracy_axis(left, dataset)
    left.legend(loc="center left", bbox_to_anchor=(0, 0.4), fontsize="small")
    right.legend(loc="best", fontsize="small")
    tenth = {
        family: next((f"{100 * np.mean(row['accuracy']):.1f}%" for row in found if row["family"] == family), "-")
        for family in (EVERY_LAYER, ALL_BUT_LAST)
    }
    lost = [
        np.mean(row["accuracy"]) - np.mean(small["accuracy"])
        for row in found
        for small in row["centroids"]
        if small["stored"] == "int8"
    ]
    cost = f"{100 * max(lost, default=0):.2f} points"
    figure.suptitle(
        f"{dataset}: with a tenth of the rows in every layer {tenth[EVERY_LAYER]} are right, with the last layer whole "
        f"{tenth[ALL_BUT_LAST]};\ncentroids in int8 instead of float32 cost at most {cost}"
    )
    figure.supxlabel(f"Means of {results['seeds']} seeds after training the codebooks.", fontsize="small")
    return figure


def _draw_fractions(axes: matplotlib.axes.Axes, found: Sequence[Row]) -> None:
    """Row VQ by its fraction, and the best others that are no larger."""
    for family in (EVERY_LAYER, ALL_BUT_LAST):
        points = [row for row in found if row["family"] == family]
        fractions = [100 * float(row["label"]) for row in points]
        axes.plot(fractions, _coordinates(points)[1], "o-", color=COLOURS[family], label=family)
    for place, row in zip(fractions, points, strict=True):
        at = (place, float(100 * np.mean(row["accuracy"])))
        axes.annotate(f"{row['nbytes'] / 1000:.0f} kB", at, (5, -11), textcoords="offset points", fontsize=8)
    for kind in (SCALAR, VECTOR):
        pairs = [
            (place, best) for place, row in zip(fractions, points, strict=True) if (best := _within(found, kind, row))
        ]
        name = f"{kind}, in at most the bytes of {ALL_BUT_LAST}"
        axes.plot(
            [place for place, _ in pairs],
            _coordinates([best for _, best in pairs])[1],
            "s--",
            color=COLOURS[kind],
            label=name,
        )
    axes.set_xlabel("rows in the codebook, % of the output features of a layer")
    axes.set_title("row VQ, and what else its bytes hold")


def _draw_centroids(axes: matplotlib.axes.Axes, found: Sequence[Row]) -> None:
    """What each way loses with its centroids in fewer bytes, against what is left of its size."""
    for group, colour in ((VECTOR, COLOURS[VECTOR]), (ALL_BUT_LAST, COLOURS[ALL_BUT_LAST])):
        axes.plot([], [], "o", color=colour, label=group)
        for row in (row for row in found if group in (row["kind"], row["family"])):
            whole, *fewer = _stored(row)
            for point, marker in zip(fewer, "vsDP", strict=False):
                lost = 100 * (np.mean(whole["accuracy"]) - np.mean(point["accuracy"]))
                axes.plot(100 * point["nbytes"] / whole["nbytes"], lost, marker, color=colour, markersize=6, alpha=0.7)
    for name, marker in zip((point["stored"] for point in found[-1]["centroids"]), "vsDP", strict=False):
        axes.plot([], [], marker, color="0.4", label=f"centroids in {name}")
    axes.axhline(0, color="black", linewidth=1)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=-0.2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.set_xlabel("size of the whole network, % of its size with centroids in float32")
    axes.set_ylabel("test accuracy lost, points (linear up to 0.1)")
    axes.set_title("the same networks with their centroids stored in fewer bytes")


def _within(found: Sequence[Row], kind: str, limit: Row) -> Row | None:
    """The best of a kind, by the held-out images, that is no larger than `limit`."""
    return next((row for row in reversed(curve(found, kind)) if row["nbytes"] <= limit["nbytes"]), None)


def _stored(row: Row) -> list[Row]:
    """A way with its centroids as they trained, then stored in each other form."""
    return [row, *row["centroids"]]


def _coordinates(points: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["nbytes"] / 1000 for row in points], [float(100 * np.mean(row["accuracy"])) for row in points]


def _label(axes: matplotlib.axes.Axes, row: Row, offset: tuple[int, int], colour: str) -> None:
    (x,), (y,) = _coordinates([row])
    axes.annotate(row["label"], (x, y), offset, textcoords="offset points", fontsize=7, color=colour)


def _float_line(axes: matplotlib.axes.Axes, found: Sequence[Row]) -> None:
    floats = next(row for row in found if row["kind"] == FLOAT)
    label = f"float, trained on as long: {floats['nbytes'] / 1000:.0f} kB"
    axes.axhline(float(100 * np.mean(floats["accuracy"])), color="black", linewidth=1, label=label)


def _size_axis(axes: matplotlib.axes.Axes) -> None:
    axes.set_xscale("log", subs=[])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("size of the whole network, kB (1 kB = 1,000 bytes; log scale)")


def _accuracy_axis(axes: matplotlib.axes.Axes, dataset: str) -> None:
    functions = (lambda value: -np.log(np.maximum(CEILING - value, 1e-3)), lambda t: CEILING - np.exp(-t))
    axes.set_yscale("function", functions=functions)
    low, high = axes.dataLim.intervaly
    axes.set_ylim(low - 0.1 * (CEILING - low), high + 0.1 * max(CEILING - high, 0))
    axes.set_yticks([tick for tick in (TICKS if low < FINE_TICKS[0] else FINE_TICKS) if low <= tick <= high])
    axes.set_ylabel(f"test accuracy on {dataset}, % (stretched towards {CEILING:g})")
    axes.grid(alpha=0.3)
