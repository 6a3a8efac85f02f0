"""The four pictures of `experiments/vq_basics.py`."""

from typing import Any

import matplotlib.figure
import numpy as np

import jaxvq


def draw_lookup(tables: dict[str, Any]) -> matplotlib.figure.Figure:
    """Values, codes and what they decode to."""
    figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle("A codebook is a lookup table: store which centroid is nearest, not the value")
    for axes, (name, table) in zip(figure.subplots(1, 2), tables.items(), strict=True):
        values, codes, centroids = table["values"], table["codes"], table["centroids"]
        axes.hlines(centroids, -0.5, len(values) - 0.5, colors="tab:blue", linestyles=":", linewidth=1)
        for index, centroid in enumerate(centroids):
            axes.text(len(values) - 0.45, centroid, f"code {index}: {centroid:g}", color="tab:blue", va="center")
        axes.plot(values, "o", color="black", label="value")
        axes.plot(table["decoded"], "_", markersize=26, color="tab:blue", label="its centroid")
        for index, (value, code) in enumerate(zip(values, codes, strict=True)):
            axes.annotate(f"{value:g} → {code}", (index, value), (0, 9), textcoords="offset points", ha="center")
        wrong = [i for i, code in enumerate(table.get("published_codes", codes)) if code != codes[i]]
        if wrong:
            decoded = [centroids[table["published_codes"][i]] for i in wrong]
            axes.plot(wrong, decoded, "x", color="tab:red", markersize=10, label="published code, not the nearest")
        axes.set(title=name, xlabel="which value", ylabel="value", xticks=range(len(values)))
        axes.set_xlim(-0.5, len(values) + 0.9)
        axes.margins(y=0.12)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_fit(fits: dict[str, Any]) -> matplotlib.figure.Figure:
    """The cloud with both codebooks, and the loss of the gradient."""
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    errors = fits["errors"]
    ratio = errors["gradient"] / errors["k-means"]
    figure.suptitle(
        f"k-means and gradient descent on the diff find codebooks of like quality (squared error {ratio:.2f} : 1)"
    )
    points, codebook = np.asarray(fits["observations"]), fits["by_kmeans"]
    codes, _ = jaxvq.vq(points, codebook)
    left.scatter(*points.T, c=np.asarray(codes) % 10, cmap="tab10", s=3, alpha=0.4, linewidths=0)
    left.plot(*np.asarray(codebook).T, "o", color="black", label=f"k-means, squared error {errors['k-means']:.4f}")
    left.plot(*np.asarray(fits["by_gradient"]).T, "x", color="tab:red", label=f"gradient, {errors['gradient']:.4f}")
    left.set(xlabel="first coordinate", ylabel="second coordinate", title="observations, coloured by code")
    left.legend(fontsize="small")
    right.plot(fits["losses"], color="tab:red", label="gradient (Adam)")
    right.axhline(errors["k-means"], color="black", linestyle=":", label="k-means, 100 iterations")
    right.set(xlabel="step", ylabel="mean squared diff", yscale="log", title="both start from the same 16 observations")
    right.set_title("gradient descent on the codebook")
    right.legend()
    right.grid(alpha=0.3)
    return figure


def draw_image(
    image: np.ndarray, pictures: list[dict[str, Any]], jpeg: list[tuple[int, float]]
) -> matplotlib.figure.Figure:
    """The image at three rates, and decibels against bytes."""
    figure = matplotlib.figure.Figure(figsize=(13, 7.5), layout="constrained")
    best = pictures[-1]
    figure.suptitle(
        f"An image as {best['entries']} blocks of pixels and their codes: "
        f"{image.nbytes / best['nbytes']:.0f} times smaller at {best['psnr_db']:.1f} dB"
    )
    grid = figure.add_gridspec(2, 3)
    shown = [pictures[0], pictures[len(pictures) // 2], pictures[-1]]
    views = [("original", image, image.nbytes, None)]
    views += [(f"{row['entries']} blocks", row["image"], row["nbytes"], row["psnr_db"]) for row in shown]
    for place, (name, view, size, psnr) in zip(((0, 0), (0, 1), (0, 2), (1, 0)), views, strict=True):
        axes = figure.add_subplot(grid[place])
        axes.imshow(view)
        axes.set_axis_off()
        axes.set_title(f"{name}: {size / 1000:,.1f} kB" + ("" if psnr is None else f", {psnr:.1f} dB"), fontsize=10)
    axes = figure.add_subplot(grid[1, 1:])
    sizes = [row["nbytes"] / 1000 for row in pictures]
    axes.semilogx(
        sizes, [row["psnr_db"] for row in pictures], "o-", color="tab:blue", label="vector quantization of blocks"
    )
    for row, size in zip(pictures, sizes, strict=True):
        axes.annotate(f"{row['entries']}", (size, row["psnr_db"]), (4, -12), textcoords="offset points")
    axes.semilogx(
        [size / 1000 for size, _ in jpeg], [psnr for _, psnr in jpeg], "s--", color="grey", label="JPEG, for comparison"
    )
    axes.set(xlabel="size (kB, codes and codebook)", ylabel="peak signal-to-noise ratio (dB)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    return figure


def draw_embeddings(found: dict[str, Any]) -> matplotlib.figure.Figure:
    """Perplexity against bits per weight of the embedding table."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    rows = found["rows"]
    exact = rows[0]["perplexity"]
    for kind, colour in (("Product", "tab:blue"), ("KMeans", "tab:red")):
        points = [(row["bits_per_weight"], row["perplexity"]) for row in rows if row["method"].startswith(kind)]
        label = {"Product": "product quantization, d = 4, one codebook", "KMeans": "palette for the table"}[kind]
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=label)
    axes.axhline(exact, color="black", linestyle=":", label=f"float32: {exact:.2f}")
    near = min(
        (row for row in rows[1:] if row["perplexity"] < 1.02 * exact), key=lambda row: row["nbytes"], default=rows[0]
    )
    more = near["perplexity"] / exact - 1
    axes.set_title(
        f"The embedding table of a small transformer, {found['shape'][0]} x {found['shape'][1]}:\n"
        f"{32 / near['bits_per_weight']:.1f} times smaller at {more:.1%} more perplexity"
    )
    axes.set(xlabel="bits per weight, codebooks counted", ylabel="perplexity on held-out text (words)", yscale="log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:g}")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
