"""What vector quantization is, in four pictures: the lookup table, the codebook found two ways, an image, embeddings.

python -m experiments.vq_basics [--smoke] [--out DIR] [--text FILE] [--steps N]
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
import numpy as np
import optax
import rich
import rich.progress
import rich.table
from jaxtyping import Array, Float, Int, UInt8

import jaxvq
from experiments.language import LanguageConfig, perplexity, read_text, tokenize, train_model
from experiments.vq_pictures import draw_embeddings, draw_fit, draw_image, draw_lookup
from jaxvq import KMeans, Product, QuantizedArray, Rule
from jaxvq.methods import AbstractMethod

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


@jax.jit
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
    small = quantize_blocks(image, entries, config)
    back = from_blocks(np.asarray(small.dequantize()) + 128, image.shape, config.block)
    back = np.clip(np.round(back), 0, 255).astype(np.uint8)
    return {"entries": entries, "image": back, "psnr_db": psnr_db(image, back), "nbytes": small.nbytes}


def quantize_blocks(image: UInt8[np.ndarray, "height width 3"], entries: int, config: Config) -> QuantizedArray:
    """The blocks of an image, one per row and less 128, as codes."""
    blocks = to_blocks(image.astype(np.float32), config.block)
    method = Product(k=entries, dim=blocks.shape[1], codebook_dtype="int8")
    tree = {"blocks": jnp.asarray(blocks) - 128}
    rule = Rule("blocks", method, out_axis=0)
    return jaxvq.quantize_params(tree, rule, key=jax.random.key(config.seed))["blocks"]


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
    rows = [embedding_row(params, words, method, config) for method in (None, *embedding_methods(config))]
    return {"words": len(words), "vocabulary": len(vocabulary), "shape": list(params["embedding"].shape), "rows": rows}


def embedding_methods(config: Config) -> list[AbstractMethod]:
    """What is tried on the embedding table: product quantization, then palettes."""
    products = [Product(bits=bits, dim=4, codebook_dtype="bfloat16") for bits in config.embedding_bits]
    return [*products, *(KMeans(bits=bits) for bits in config.palette_bits)]


def embedding_row(
    params: Any, words: Int[np.ndarray, " n"], method: AbstractMethod | None, config: Config
) -> dict[str, Any]:
    """Size of the embedding table, and how well the transformer predicts with it; None leaves it float."""
    if method is None:
        row = {"method": "float32", "nbytes": params["embedding"].nbytes, "bits_per_weight": 32.0}
        return row | {"perplexity": perplexity(params, words, config.language)}
    small = jaxvq.quantize_params(params, Rule("embedding", method), key=jax.random.key(config.seed))
    row = {key: getattr(small["embedding"], key) for key in ("nbytes", "bits_per_weight")}
    exact = jaxvq.dequantize_params(small)
    return {"method": str(method), **row, "perplexity": perplexity(exact, words, config.language)}


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


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.vq_basics", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/vq_basics"), help="the folder to write to"
    )
    parser.add_argument("--text", type=pathlib.Path, help="a text to train on (default: Python's own documentation)")
    parser.add_argument("--steps", type=int, default=LanguageConfig.steps, help="of training the transformer")
    chosen = parser.parse_args(arguments)
    if not chosen.smoke:
        return Config(chosen.out, language=LanguageConfig(steps=chosen.steps), text=chosen.text)
    language = LanguageConfig(vocabulary=32, width=8, layers=1, heads=2, steps=5, batch_size=4, length=16)
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
