"""How long clustering takes and how well it does, beside faiss, scikit-learn and kmeans1d in the same run.

    python -m experiments.bench_kmeans [--smoke] [--json FILE] [--out FOLDER]

Claim: a product-quantization codebook takes at most twice as long as with faiss-cpu, with the same error; an optimal
codebook of single values takes a fraction of scikit-learn's time, with a fraction of its error. Times are medians of
runs that take turns, after compilation; the first call, which compiles, is reported apart. A package that is not
installed is named and its rows are left out.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import rich.box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxvq.cluster.kmeans import kmeans
from jaxvq.cluster.product import fit_product
from jaxvq.cluster.scalar import kmeans1d
from jaxvq.ops.nearest import vq

Fit = Callable[[int], Any]  # from a seed to a codebook


@dataclasses.dataclass(frozen=True)
class Config:
    """What is clustered.

    Attributes:
      vectors: how many vectors of 8 values.
      weight: rows and columns of the square weight that is cut into vectors of 4 values.
      scalars: how many single values for scikit-learn to cluster too.
      exact_scalars: how many for the exact algorithm of `kmeans1d`.
      k: entries per codebook.
      iterations: of Lloyd.
      repeats: timed runs of each contender; scikit-learn runs once.
      threads: for faiss.
      seed: of data and codebooks.
      out: the folder of the chart.
    """

    vectors: int = 131_072
    weight: int = 2_048
    scalars: int = 1_048_576
    exact_scalars: int = 100_000
    k: int = 256
    iterations: int = 20
    repeats: int = 7
    threads: int = 2
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/bench_kmeans")


SMOKE = Config(vectors=8_192, weight=128, scalars=8_192, exact_scalars=2_000, k=32, iterations=5, repeats=2)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to fit a codebook; `runs` says how often it is timed."""

    name: str
    fit: Fit
    runs: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Values to cluster, `[n, d]`, and who does it; the first contender is the reference of the ratios."""

    name: str
    points: np.ndarray
    contenders: tuple[Contender, ...]


def main(config: Config) -> dict[str, Any]:
    """Runs every problem; returns `{"config", "device", "rows"}`, one row per contender, and draws them."""
    console = Console()
    peers = {name: find(name, console) for name in ("faiss", "sklearn", "kmeans1d")}
    problems = [make(config, peers) for make in (vector_problem, weight_problem, scalar_problem, exact_problem)]
    rows = [row for problem in problems for row in measure(problem, config, console)]
    console.print(as_table(rows))
    config.out.mkdir(parents=True, exist_ok=True)
    draw(rows, config.out / "bench_kmeans.png")
    console.print(f"written to {config.out / 'bench_kmeans.png'}")
    return {
        "config": dataclasses.asdict(config) | {"out": str(config.out)},
        "device": jax.devices()[0].device_kind,
        "rows": rows,
    }


def find(name: str, console: Console) -> Any:
    """The package `name`, or None, which is said."""
    try:
        return importlib.import_module("sklearn.cluster" if name == "sklearn" else name)
    except ImportError:
        console.print(f"{name} is not installed: its rows are left out")
        return None


def vector_problem(config: Config, peers: dict[str, Any]) -> Problem:
    points = np.random.default_rng(config.seed).standard_normal((config.vectors, 8)).astype(np.float32)
    return Problem(f"{config.vectors} x 8", points, vector_contenders(points, config, peers))


def weight_problem(config: Config, peers: dict[str, Any]) -> Problem:
    weight = np.random.default_rng(config.seed + 1).standard_normal((config.weight, config.weight))
    points = (0.02 * weight).astype(np.float32).reshape(-1, 4)
    return Problem(f"weight {config.weight} x {config.weight}, d=4", points, vector_contenders(points, config, peers))


def vector_contenders(points: np.ndarray, config: Config, peers: dict[str, Any]) -> tuple[Contender, ...]:
    """faiss, ours with k-means++, ours from random points as faiss starts, scikit-learn."""
    x, k, iterations = jnp.asarray(points), config.k, config.iterations
    contenders = []
    if faiss := peers["faiss"]:
        faiss.omp_set_num_threads(config.threads)

        def fit_faiss(seed: int) -> np.ndarray:
            shape = points.shape[1], k
            fitted = faiss.Kmeans(*shape, niter=iterations, seed=seed + 1, max_points_per_centroid=len(points))
            fitted.train(points)
            return fitted.centroids

        contenders.append(Contender("faiss", fit_faiss, config.repeats))

    def fit_ours(seed: int) -> jax.Array:
        return fit_product(jax.random.key(seed), x[None], k, iterations=iterations)[0]

    def fit_from_random(seed: int) -> jax.Array:
        start = np.random.default_rng(seed).choice(len(points), k, replace=False)
        return kmeans(x, x[start], iterations=iterations)

    contenders.append(Contender("jaxvq, k-means++ and Lloyd", fit_ours, config.repeats))
    contenders.append(Contender("jaxvq, Lloyd from random points", fit_from_random, config.repeats))
    if cluster := peers["sklearn"]:
        contenders.append(sklearn_contender(cluster, points, k, init="random", max_iter=iterations, tol=0))
    return tuple(contenders)


def sklearn_contender(cluster: Any, points: np.ndarray, k: int, **settings: Any) -> Contender:
    def fit(seed: int) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns when it stops before it converges
            return cluster.KMeans(k, n_init=1, random_state=seed, **settings).fit(points).cluster_centers_

    return Contender("scikit-learn", fit, 1)


def scalar_problem(config: Config, peers: dict[str, Any]) -> Problem:
    points = np.random.default_rng(config.seed + 2).standard_normal((config.scalars, 1)).astype(np.float32)
    contenders = (scalar_contender(points, config),)
    if cluster := peers["sklearn"]:
        contenders = (sklearn_contender(cluster, points, config.k), *contenders)
    return Problem(f"{config.scalars} values", points, contenders)


def exact_problem(config: Config, peers: dict[str, Any]) -> Problem:
    points = np.random.default_rng(config.seed + 3).standard_normal((config.exact_scalars, 1)).astype(np.float32)
    contenders = (scalar_contender(points, config),)
    if package := peers["kmeans1d"]:
        values = points[:, 0].tolist()
        exact = Contender("kmeans1d", lambda seed: np.array(package.cluster(values, config.k).centroids)[:, None], 1)
        contenders = (exact, *contenders)
    return Problem(f"{config.exact_scalars} values, exact", points, contenders)


def scalar_contender(points: np.ndarray, config: Config) -> Contender:
    values = jnp.asarray(points[:, 0])
    return Contender("jaxvq, one-dimensional", lambda seed: kmeans1d(values, config.k)[:, None], config.repeats)


def measure(problem: Problem, config: Config, console: Console) -> list[dict[str, Any]]:
    """Times the contenders in turns; a row for each."""
    first = {c.name: timed(c.fit, config.seed)[1] for c in problem.contenders if c.runs > 1}
    seconds: dict[str, list[float]] = {c.name: [] for c in problem.contenders}
    errors: dict[str, list[float]] = {c.name: [] for c in problem.contenders}
    for run in track(range(config.repeats), problem.name, console=console):
        for contender in problem.contenders:
            if run < contender.runs:
                codebook, duration = timed(contender.fit, config.seed + run)
                seconds[contender.name].append(duration)
                errors[contender.name].append(distortion(problem.points, codebook))
    reference = problem.contenders[0].name
    return [
        {
            "problem": problem.name,
            "contender": name,
            "first_seconds": first.get(name),
            "seconds": statistics.median(seconds[name]),
            "time_ratio": statistics.median(seconds[name]) / statistics.median(seconds[reference]),
            "distortion": statistics.median(errors[name]),
            "distortion_ratio": statistics.median(errors[name]) / statistics.median(errors[reference]),
        }
        for name in seconds
    ]


def timed(fit: Fit, seed: int) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    codebook = jax.block_until_ready(fit(seed))
    return np.asarray(codebook, np.float32), time.perf_counter() - start


def distortion(points: np.ndarray, codebook: np.ndarray) -> float:
    """Mean squared error per value."""
    _, diff = vq(points, codebook)
    return float((np.asarray(diff, np.float64) ** 2).mean() / points.shape[1])


def as_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("problem", "contender", "seconds", "ratio", "first call", "error", "ratio", box=rich.box.SIMPLE_HEAD)
    for row in rows:
        first = "" if row["first_seconds"] is None else f"{row['first_seconds']:.2f}"
        times = f"{row['seconds']:.3f}", f"{row['time_ratio']:.2f}", first
        table.add_row(
            row["problem"], row["contender"], *times, f"{row['distortion']:.4g}", f"{row['distortion_ratio']:.4f}"
        )
    return table


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A panel per problem, a bar per contender: its length the time, its label the error."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    parts = [[row for row in rows if row["problem"] == problem] for problem in problems]
    heights = [len(part) + 1 for part in parts]
    figure, panels = plt.subplots(
        len(problems), figsize=(9, 0.42 * sum(heights) + 1), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes, problem, part in zip(panels[:, 0], problems, parts, strict=True):
        times = [row["seconds"] for row in part]
        ours = ["jaxvq" in row["contender"] for row in part]
        axes.barh([row["contender"] for row in part], times, color=["tab:blue" if own else "0.6" for own in ours])
        for place, row in enumerate(part):
            text = f" {row['seconds']:.2f} s, squared error {row['distortion_ratio']:.4f}"
            axes.text(row["seconds"], place, text, va="center", fontsize=9)
        mine = min((time for time, own in zip(times, ours, strict=True) if own), default=None)
        ratio = "" if mine is None else f": jaxvq takes {mine / times[0]:.2g} times as long as {part[0]['contender']}"
        axes.set_title(f"{problem}{ratio}", loc="left", fontsize=10)
        axes.set_xlim(0, 1.5 * max(times))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("seconds after compilation, median; squared error in units of the first contender's")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def cli() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", default=Config.out)
    arguments = parser.parse_args()
    result = main(dataclasses.replace(SMOKE if arguments.smoke else Config(), out=arguments.out))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    cli()
