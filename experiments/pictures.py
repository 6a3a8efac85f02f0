"""Small pictures of images, weights, codes and sizes, for the notebooks."""

import itertools
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from jaxtyping import ArrayLike, Float
from matplotlib.ticker import LogLocator, NullLocator

from jaxvq import QuantizedArray

LEAST = 0.01  # percent: what is always right has no place on a logarithmic axis


def draw_images(
    images: Float[np.ndarray, "n height width c"],
    names: Sequence[str],
    *,
    title: str,
    columns: int = 8,
    contrast: bool = True,
) -> matplotlib.figure.Figure:
    """Images side by side: grey with one channel, colours with three.

    Args:
      images: any values.
      names: one for each image.
      title: of the figure.
      columns: images in a row.
      contrast: each image over its own range of values; False takes them as values from 0 to 255.
    """
    rows = -(-len(images) // columns)
    figure = matplotlib.figure.Figure(figsize=(1.1 * columns, 1.3 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, name in zip(figure.axes, images, names, strict=False):
        low, high = (image.min(), image.max()) if contrast else (0, 255)
        axes.imshow(((image - low) / max(high - low, 1e-9)).squeeze(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
    return figure


def draw_values(before: np.ndarray, after: np.ndarray, *, title: str) -> matplotlib.figure.Figure:
    """How often each weight occurs: a histogram before, one bar for each distinct value after."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharex=True)
    left.hist(before.ravel(), bins=60, color="black")
    left.set(title=f"before: {len(np.unique(before)):,} distinct values", xlabel="weight", ylabel="weights per bin")
    values, counts = np.unique(after, return_counts=True)
    right.vlines(values, 0, counts, color="tab:blue", linewidth=2 if len(values) < 40 else 1)
    right.plot(values, counts, "." if len(values) < 40 else ",", color="tab:blue", markersize=9)
    right.set(title=f"after: {len(values):,}", xlabel="weight", ylabel="weights of this value", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def draw_codes(weight: QuantizedArray, *, title: str) -> matplotlib.figure.Figure:
    """The codes of a weight, one pixel each; only the first stage where several are added up."""
    codes = np.asarray(weight.unpack())[..., 0]
    figure = matplotlib.figure.Figure(figsize=(9, 1.2 + min(7 * codes.shape[0] / codes.shape[1], 4)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    image = axes.imshow(codes, cmap="viridis", interpolation="nearest", aspect="auto")
    axes.set(title=title, xlabel="output feature", ylabel="place along the input")
    figure.colorbar(image, label="code")
    return figure


def draw_vectors(
    vectors: Float[ArrayLike, "n d"], codebook: Float[ArrayLike, "k d"], *, title: str
) -> matplotlib.figure.Figure:
    """The first two values of vectors and of the entries of a codebook."""
    figure = matplotlib.figure.Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*np.asarray(vectors)[:, :2].T, ",", color="grey", label="weights")
    axes.plot(*np.asarray(codebook)[:, :2].T, ".", color="tab:blue", markersize=5, label="entries of the codebook")
    axes.set(xlabel="first value of the vector", ylabel="second value")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    return figure


def draw_sizes(points: Sequence[tuple[str, float, float]], *, title: str) -> matplotlib.figure.Figure:
    """Error against size: one point for each (name, bytes, accuracy in percent), named in the legend."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    for (name, nbytes, percent), marker in zip(points, itertools.cycle("osD^vP*<>"), strict=False):
        label = f"{name}: {nbytes / 1000:,.1f} kB, {percent:.2f}% right"
        wrong = max(100 - percent, LEAST)
        axes.plot(nbytes / 1000, wrong, marker, markersize=9, alpha=0.8, label=label)
    axes.set(xlabel="size, kB (1 kB = 1,000 bytes)", ylabel="wrong, % (lower is better)")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure
