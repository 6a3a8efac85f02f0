"""What vector quantization is, in four pictures: the lookup table, the codebook found two ways, an image, embeddings.

python -m experiments.vq_basics [--smoke] [--out DIR] [--text FILE]
"""

import argparse
import dataclasses
import functools
import io
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich
import rich.progress
import rich.table
from jaxtyping import Array, Float, Int, UInt8

import jaxvq
from experiments.language import LanguageConfig, perplexity, read_text, tokenize, train_model
from jaxvq import KMeans, Product

WEIGHTS, CENTROIDS = (0.52, 1.3, -0.9), (0.5, 1.25, -1.0)
WORD, WORD_CENTROIDS, PUBLISHED_CODES = (0.45, -0.32, 0.12, 0.91, -0.56), (0.445, -0.56, 0.12), (0, 1, 0, 0, 1)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      out: the folder to write to.
      observations: points of the two-dimensional example.
      entries: of its codebook.
      steps: of gradient descent on the codebook.
      image_entries: sizes of the codebook for the image.
      block: side of the pixel blocks.
      crop: side of the square cut from the image; None for all of it.
      language: the transformer whose embeddings are compressed, and its training.
      embedding_bits: bits per code of its product quantization.
      palette_bits: bits per code of its palettes.
      text: a file to train on; None for Python's own documentation.
      seed: of everything random.
    """

    out: pathlib.Path
    observations: int = 3000
    entries: int = 16
    steps: int = 400
    image_entries: tuple[int, ...] = (4, 16, 64, 256, 1024)
    block: int = 4
    crop: int | None = None
    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)
    embedding_bits: tuple[int, ...] = (4, 6, 8, 10)
    palette_bits: tuple[int, ...] = (2, 3, 4)
    text: pathlib.Path | None = None
    seed: int = 0


def nearest_by_broadcasting(
    observations: Float[Array, "n d"], codebook: Float[Array, "k d"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The code of each observation and its distance to that entry, as one reads it: `[n, 1, d] - [1, k, d]`."""
    distances = jnp.sqrt(jnp.sum((observations[:, None, :] - codebook[None, :, :]) ** 2, axis=-1))
    return jnp.argmin(distances, axis=1), jnp.min(distances, axis=1)


def lookup_tables() -> dict[str, Any]:
    """The two textbook tables: what is stored, and what comes back."""
    tables = {}
    for name, values, centroids in (("weights", WEIGHTS, CENTROIDS), ("word vector", WORD, WORD_CENTROIDS)):
        codes, diff = jaxvq.vq(jnp.array(values), jnp.array(centroids))
        again, _ = nearest_by_broadcasting(jnp.array(values)[:, None], jnp.array(centroids)[:, None])
        if not np.array_equal(codes, again):
            raise RuntimeError(f"{name}: `jaxvq.vq` says {codes}, broadcasting says {again}")
        tables[name] = {
            "values": values,
            "centroids": centroids,
            "codes": np.asarray(codes).tolist(),
            "decoded": [centroids[code] for code in np.asarray(codes)],
            "diff": np.asarray(diff).tolist(),
        }
    published = jnp.array(WORD_CENTROIDS)[jnp.array(PUBLISHED_CODES)]
    tables["word vector"]["published_codes"] = PUBLISHED_CODES
    tables["word vector"]["published_diff"] = np.abs(np.asarray(published) - np.array(WORD)).tolist()
    return tables


def cloud(config: Config) -> Float[Array, "n 2"]:
    """Observations to quantize: a correlated Gaussian, half of it bent."""
    first, second = jax.random.normal(jax.random.key(config.seed), (2, config.observations))
    return jnp.stack([first, 0.5 * second + 0.4 * first**2 - 0.4], axis=1)


def fit_by_gradient(observations: Float[Array, "n d"], start: Float[Array, "k d"], steps: int) -> tuple[Array, Array]:
    """Adam on the mean squared diff. The codes have no gradient: each step takes them as they are.

    Returns:
      The codebook, and the loss before each step.
    """
    optimizer = optax.adam(0.05)

    def loss(codebook: Float[Array, "k d"]) -> Float[Array, ""]:
        codes, _ = nearest_by_broadcasting(observations, jax.lax.stop_gradient(codebook))
        return jnp.mean(jnp.sum((observations - codebook[codes]) ** 2, axis=-1))

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        codebook, state = carry
        value, gradient = jax.value_and_grad(loss)(codebook)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(codebook, updates), state), value

    (codebook, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return codebook, losses


def fit_two_ways(config: Config) -> dict[str, Any]:
    """The codebook of the cloud by k-means and by gradient, from the same start."""
    observations = cloud(config)
    method = Product(k=config.entries, dim=2, iterations=100)
    layout = method.layout(observations.shape, observations.dtype, out_axis=0)
    quantized: Any = method.fit(observations, layout, key=jax.random.key(config.seed))
    by_kmeans = quantized.decoder.vectors[0, 0, 0]
    start = observations[: config.entries]
    by_gradient, losses = jax.jit(fit_by_gradient, static_argnums=2)(observations, start, config.steps)

    def error(codebook: Array) -> float:
        return float(jnp.mean(jaxvq.vq(observations, codebook)[1] ** 2))

    return {
        "observations": observations,
        "by_kmeans": by_kmeans,
        "by_gradient": by_gradient,
        "losses": np.asarray(losses),
        "errors": {"start": error(start), "k-means": error(by_kmeans), "gradient": error(by_gradient)},
    }


def sample_image(config: Config) -> UInt8[np.ndarray, "height width 3"]:
    """The photograph of a Chinese temple that comes with scikit-learn."""
    import sklearn.datasets

    image = np.asarray(sklearn.datasets.load_sample_image("china.jpg"))
    side = config.crop
    image = image if side is None else image[100 : 100 + side, 100 : 100 + side]
    height, width = (length - length % config.block for length in image.shape[:2])
    return image[:height, :width]


def compress_image(image: UInt8[np.ndarray, "height width 3"], entries: int, config: Config) -> dict[str, Any]:
    """Each block of pixels becomes one of `entries` blocks.

    Returns:
      The picture that comes back, its peak signal-to-noise ratio in decibels, and the bytes of codes and codebook.
    """
    blocks = to_blocks(image.astype(np.float32), config.block)
    method = Product(k=entries, dim=blocks.shape[1], codebook_dtype="int8")
    tree = {"blocks": jnp.asarray(blocks) - 128}
    small = jaxvq.quantize_params(tree, jaxvq.Rule("blocks", method, out_axis=0), key=jax.random.key(config.seed))
    back = from_blocks(np.asarray(small["blocks"].dequantize()) + 128, image.shape, config.block)
    back = np.clip(np.round(back), 0, 255).astype(np.uint8)
    return {"entries": entries, "image": back, "psnr_db": psnr_db(image, back), "nbytes": small["blocks"].nbytes}


def psnr_db(image: UInt8[np.ndarray, "height width c"], back: UInt8[np.ndarray, "height width c"]) -> float:
    """The peak signal-to-noise ratio of what came back, in decibels; infinite if nothing changed."""
    error = np.mean((back.astype(float) - image) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def to_blocks(image: Float[np.ndarray, "height width c"], side: int) -> Float[np.ndarray, "blocks values"]:
    """Cuts an image into squares, one per row."""
    height, width, channels = image.shape
    cut = image.reshape(height // side, side, width // side, side, channels).transpose(0, 2, 1, 3, 4)
    return cut.reshape(-1, side * side * channels)


def from_blocks(blocks: Float[np.ndarray, "blocks values"], shape: tuple[int, ...], side: int) -> np.ndarray:
    """Undoes `to_blocks`."""
    height, width, channels = shape
    cut = blocks.reshape(height // side, width // side, side, side, channels)
    return cut.transpose(0, 2, 1, 3, 4).reshape(shape)


def jpeg_sizes(image: UInt8[np.ndarray, "height width 3"]) -> list[tuple[int, float]]:
    """(bytes, decibels) of the same image as JPEG, which knows about images."""
    from PIL import Image

    sizes = []
    for quality in (5, 10, 20, 40, 70):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=quality)
        sizes.append((file.tell(), psnr_db(image, np.asarray(Image.open(file)))))
    return sizes


def compress_embeddings(config: Config) -> dict[str, Any]:
    """Trains a small transformer, quantizes its embedding table, and asks how well it still predicts."""
    words, vocabulary = tokenize(read_text(config.text), config.language.vocabulary)
    params = train_model(words, config.language, seed=config.seed, progress=_track("training a transformer"))
    rows = [{"method": "float32", "nbytes": params["embedding"].nbytes, "bits_per_weight": 32.0}]
    rows[0]["perplexity"] = perplexity(params, words, config.language)
    methods = [Product(bits=bits, dim=4, codebook_dtype="bfloat16") for bits in config.embedding_bits]
    for method in (*methods, *(KMeans(bits=bits) for bits in config.palette_bits)):
        small = jaxvq.quantize_params(params, jaxvq.Rule("embedding", method), key=jax.random.key(config.seed))
        table = small["embedding"]
        row = {"method": str(method), "nbytes": table.nbytes, "bits_per_weight": table.bits_per_weight}
        rows.append(row | {"perplexity": perplexity(jaxvq.dequantize_params(small), words, config.language)})
    return {"words": len(words), "vocabulary": len(vocabulary), "shape": list(params["embedding"].shape), "rows": rows}


def _track(description: str) -> Any:
    return functools.partial(rich.progress.track, description=description)


def main(config: Config) -> dict[str, Any]:
    """Runs the four parts and draws them.

    Returns:
      Everything found but for the pictures, as written to `results.json`.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    tables, fits = lookup_tables(), fit_two_ways(config)
    image = sample_image(config)
    sizes = _track("compressing an image")(config.image_entries)
    pictures = [compress_image(image, entries, config) for entries in sizes]
    embeddings = compress_embeddings(config)
    jpeg = jpeg_sizes(image)
    for name, figure in {
        "lookup": draw_lookup(tables),
        "fit": draw_fit(fits),
        "image": draw_image(image, pictures, jpeg),
        "embeddings": draw_embeddings(embeddings),
    }.items():
        figure.savefig(config.out / f"vq_basics_{name}.png", dpi=130)
    found = {
        "tables": tables,
        "errors": fits["errors"],
        "image": {
            "nbytes": image.nbytes,
            "vq": [{key: float(row[key]) for key in ("entries", "psnr_db", "nbytes")} for row in pictures],
            "jpeg": jpeg,
        },
        "embeddings": embeddings,
    }
    (config.out / "results.json").write_text(json.dumps(found, indent=2))
    _print(found)
    return found


def _print(found: dict[str, Any]) -> None:
    word = found["tables"]["word vector"]
    rich.print(f"word vector: codes {word['codes']}, published {list(word['published_codes'])}")
    rich.print("mean squared diff: " + ", ".join(f"{name} {value:.4f}" for name, value in found["errors"].items()))
    table = rich.table.Table(title=f"Image of {found['image']['nbytes']:,} bytes")
    for column in ("blocks in the codebook", "bytes", "times smaller", "PSNR (dB)"):
        table.add_column(column, justify="right")
    for row in found["image"]["vq"]:
        smaller = found["image"]["nbytes"] / row["nbytes"]
        table.add_row(f"{row['entries']:.0f}", f"{row['nbytes']:,.0f}", f"{smaller:.1f}", f"{row['psnr_db']:.2f}")
    rich.print(table)
    table = rich.table.Table(
        title="Embedding table of a small transformer, {} x {}".format(*found["embeddings"]["shape"])
    )
    for column in ("method", "bytes", "bits per weight", "perplexity"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in found["embeddings"]["rows"]:
        table.add_row(row["method"], f"{row['nbytes']:,}", f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}")
    rich.print(table)


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


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.vq_basics", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/vq_basics"), help="the folder to write to"
    )
    parser.add_argument("--text", type=pathlib.Path, help="a text to train on (default: Python's own documentation)")
    chosen = parser.parse_args(arguments)
    if not chosen.smoke:
        return Config(chosen.out, text=chosen.text)
    language = LanguageConfig(vocabulary=128, width=16, layers=1, steps=5, batch_size=4, length=16)
    return Config(
        chosen.out,
        observations=300,
        entries=4,
        steps=50,
        image_entries=(4,),
        crop=64,
        language=language,
        embedding_bits=(2,),
        palette_bits=(2,),
        text=chosen.text,
    )


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
