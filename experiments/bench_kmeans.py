"""How long clustering takes and how well it does, beside the packages made for it, in the same run.

    python -m experiments.bench_kmeans [--smoke] [--only NAME ...] [--json FILE] [--out FOLDER]

Claim: on two CPU cores a product-quantization codebook takes no longer than with faiss, at the same error, a million
values get their 256 best entries in under a second, and a whole network is quantized by a cold process in under ten.
On one NVIDIA H200 an iteration of Lloyd takes at most 0.8 times as long as flash-kmeans' (0.5 at k = 65536), with the
error of float32 arithmetic, and single values get their optimal codebook in less time than ten of its iterations.

Contenders take turns; times are medians after compilation, the first call is reported apart. Time per iteration is
that of many iterations less that of one, in calls that start alike. A package that is not installed is named and left
out; one that fails gets a row that says so. Results are written after each problem. What is measured depends on the
backend; on a GPU set XLA_PYTHON_CLIENT_PREALLOCATE=false, so that PyTorch has room beside JAX.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import track

from experiments import clustering_contenders as contenders
from experiments.clustering_charts import draw_race, draw_scaling, show
from experiments.clustering_cold import METHODS, in_cold_process
from experiments.clustering_contenders import Peers, find_peers, forget
from experiments.clustering_race import Contender, Problem, Row, Target, chip, lloyd_limits, race, sort_limits

SAME_ERROR = Target("distortion_ratio", 1.001)


@dataclasses.dataclass(frozen=True)
class Case:
    """Values to cluster, drawn from a Gaussian.

    Attributes:
      name: for `--only`.
      kind: which of `BUILDERS` makes a problem of it.
      points: in each set.
      k: entries per codebook.
      dim: values of a point.
      sets: how many to cluster independently.
      iterations: of Lloyd.
      repeats: timed runs of each contender but for slow ones.
      most: the target: for times as ratios, but for "values" in seconds; None for none.
    """

    name: str
    kind: str
    points: int
    k: int
    dim: int = 1
    sets: int = 1
    iterations: int = 20
    repeats: int = 5
    most: float | None = None

    def title(self) -> str:
        """The case in words."""
        what = "values" if self.dim == 1 else f"vectors, d={self.dim}"
        rows = f"{self.sets:,} rows of " if self.sets > 1 else ""
        end = " each" if self.sets > 1 else ", exact" if self.kind == "exact" else ""
        return f"{rows}{self.points:,} {what}, k={self.k:,}{end}"


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Time per iteration against points and against entries.

    Attributes:
      points: how many, with `k` entries.
      entries: how many, for `points_for_entries` points.
      points_for_entries: see there.
      dim: values of a point.
      k: entries where the points vary.
      iterations: of Lloyd.
      repeats: timed runs of each contender.
    """

    points: tuple[int, ...]
    entries: tuple[int, ...]
    points_for_entries: int
    dim: int = 8
    k: int = 256
    iterations: int = 11
    repeats: int = 3

    def cases(self) -> list[tuple[str, Case]]:
        """What varies, and the case."""
        sizes = [("points", n, self.k) for n in self.points]
        sizes += [("entries", self.points_for_entries, k) for k in self.entries]
        return [
            (axis, Case("scaling", "curve", n, k, self.dim, iterations=self.iterations, repeats=self.repeats))
            for axis, n, k in sizes
        ]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is clustered.

    Attributes:
      cases: the problems.
      scaling: the curves; None for none.
      cold: networks of `experiments/clustering_cold.py` and the methods for each.
      threads: for faiss.
      seed: of data and codebooks.
      json: a file for the results, beside `results.json` in `out`.
      out: the folder for results and charts.
    """

    cases: tuple[Case, ...]
    scaling: Scaling | None
    cold: tuple[tuple[str, tuple[str, ...]], ...] = ()
    threads: int = 2
    seed: int = 0
    json: pathlib.Path | None = None
    out: pathlib.Path = pathlib.Path("runs/bench_kmeans")

    def only(self, names: list[str]) -> "Config":
        """Nothing but the cases of these names; "cold" and "scaling" are names too."""
        known = [case.name for case in self.cases] + ["cold"] * bool(self.cold) + ["scaling"] * bool(self.scaling)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"`--only` must name rows, got {', '.join(unknown)}; there are {', '.join(known)}")
        return dataclasses.replace(
            self,
            cases=tuple(case for case in self.cases if case.name in names),
            cold=self.cold if "cold" in names else (),
            scaling=self.scaling if "scaling" in names else None,
        )


CPU = Config(
    cases=(
        Case("vectors", "fit", 131_072, 256, dim=8, repeats=7, most=1.0),
        Case("weight", "fit", 2_048 * 2_048 // 4, 256, dim=4, repeats=3, most=1.0),
        Case("scalars", "values", 1_048_576, 256, most=1.0),
        Case("exact", "exact", 100_000, 256),
    ),
    cold=(("tradeoff, 28 x 28", METHODS), ("50 layers, 20 shapes", METHODS)),
    scaling=Scaling((8_192, 32_768, 131_072, 524_288), (16, 64, 256, 1024), 131_072),
)
GPU = Config(
    cases=(
        Case("scalars", "palettes", 2**24, 16, iterations=10, most=1.0),
        Case("rows", "palettes", 4096, 16, sets=4096, iterations=10, most=1.0),
        Case("d8-k256", "lloyd", 2**21, 256, dim=8, iterations=21, most=0.8),
        Case("d8-k4096", "lloyd", 2**21, 4096, dim=8, iterations=11, most=0.8),
        Case("d8-k65536", "lloyd", 2**21, 65536, dim=8, iterations=4, repeats=3, most=0.5),
        Case("d128-k1024", "lloyd", 2**20, 1024, dim=128, iterations=21, most=1.0),
    ),
    scaling=Scaling((2**13, 2**15, 2**17, 2**19, 2**21), (16, 256, 4096, 65536), 2**21),
)
SMOKE = {
    "cpu": Config(
        cases=(
            Case("vectors", "fit", 8_192, 32, dim=8, iterations=5, repeats=2, most=1.0),
            Case("scalars", "values", 2_000, 32, repeats=2, most=1.0),
            Case("exact", "exact", 2_000, 32, repeats=2),
        ),
        cold=(("tiny", METHODS[:1]),),
        scaling=Scaling((2_048, 8_192), (32,), 8_192, k=32, iterations=21, repeats=2),
    ),
    "gpu": Config(
        cases=(
            Case("rows", "palettes", 512, 8, sets=4, iterations=5, repeats=2, most=1.0),
            Case("d8", "lloyd", 8_192, 64, dim=8, iterations=6, repeats=2, most=0.8),
        ),
        scaling=Scaling((2_048, 8_192), (32,), 8_192, k=32, iterations=21, repeats=2),
    ),
}


def gaussian(case: Case, config: Config) -> tuple[Float[Array, "p n d"], Float[Array, "p k d"]]:
    """The points, and where to start: some of them."""
    points_key, start_key = jax.random.split(jax.random.key(config.seed))
    points = jax.random.normal(points_key, (case.sets, case.points, case.dim))
    chosen = jax.random.choice(start_key, case.points, (case.k,), replace=False)
    return points, points[:, chosen]


def fit_problem(case: Case, peers: Peers, config: Config) -> Problem:
    """Whole fits of vectors, each from its own start."""
    points, _ = gaussian(case, config)
    who = (
        *contenders.faiss_fit(peers, points, case.k, case.repeats, config.threads),
        contenders.ours_from_keys(points, case.k, case.repeats),
        contenders.ours_from_random_points(points, case.k, case.repeats),
        *contenders.scikit_learn(peers, points, case.k, init="random", max_iter=case.iterations, tol=0),
    )
    targets = () if case.most is None else (Target("time_ratio", case.most), Target("compile_seconds", 3.0))
    return _problem(case, points, who, rival="faiss", targets=targets)


def values_problem(case: Case, peers: Peers, config: Config) -> Problem:
    """Many single values, beside k-means."""
    points, _ = gaussian(case, config)
    ours = contenders.ours_one_dimensional(points, case.k, case.repeats)
    targets = () if case.most is None else (Target("seconds", case.most),)
    who = (*contenders.scikit_learn(peers, points, case.k), ours)
    return _problem(case, points, who, rival="scikit-learn", targets=targets)


def exact_problem(case: Case, peers: Peers, config: Config) -> Problem:
    """Single values, beside the exact algorithm."""
    points, _ = gaussian(case, config)
    ours = contenders.ours_one_dimensional(points, case.k, case.repeats)
    who = (*contenders.exact_kmeans1d(peers, points, case.k), ours)
    return _problem(case, points, who, rival="kmeans1d", targets=(SAME_ERROR,))


def palettes_problem(case: Case, peers: Peers, config: Config) -> Problem:
    """The optimal codebooks of single values, beside some iterations of Lloyd."""
    points, start = gaussian(case, config)
    who = (
        *contenders.flash(peers, points, start, case.repeats),
        contenders.ours_optimal(points, case.k, case.repeats),
        *contenders.torch_cdist(peers, points, start, 1),
        contenders.plain_xla(points, start, 2),
    )
    times = () if case.most is None else (Target("time_ratio", case.most),)
    problem = _problem(case, points, who, rival="flash-kmeans", targets=(*times, SAME_ERROR))
    limits = sort_limits(case.sets, case.points, chip())
    targets = (*problem.targets, Target("optimum_ratio", 1.001))
    best = contenders.optimum(peers, case.k)
    return dataclasses.replace(problem, times_one=True, limits=limits, optimum=best, targets=targets)


def lloyd_problem(case: Case, peers: Peers, config: Config) -> Problem:
    """Iterations of Lloyd on vectors, all from the same start."""
    points, start = gaussian(case, config)
    who = (
        contenders.float32_reference(points, start),
        *contenders.flash(peers, points, start, case.repeats),
        contenders.ours_from_start(points, start, case.repeats),
        *contenders.torch_cdist(peers, points, start, 1),
        contenders.plain_xla(points, start, 2),
    )
    return _per_iteration(case, _problem(case, points, who, rival="flash-kmeans"), exact="float32 reference")


def curve_problem(case: Case, peers: Peers, config: Config) -> Problem:
    """Iterations of Lloyd by the library and by the best of its rivals, for a point of a curve."""
    points, start = gaussian(case, config)
    rivals = contenders.flash(peers, points, start, case.repeats)
    rivals += contenders.faiss_from_start(peers, points, start, case.repeats, config.threads)
    who = (*rivals[:1], contenders.ours_from_start(points, start, case.repeats))
    problem = _per_iteration(case, _problem(case, points, who, rival=who[0].name))
    return dataclasses.replace(problem, check=False, targets=())


def _problem(
    case: Case,
    points: Float[Array, "p n d"],
    who: tuple[Contender, ...],
    *,
    rival: str,
    targets: tuple[Target, ...] = (),
) -> Problem:
    return Problem(case.title(), points, case.k, case.iterations, who, rival, rival, targets)


def _per_iteration(case: Case, problem: Problem, exact: str = "") -> Problem:
    limits = lloyd_limits(case.points, case.dim, case.k, chip())
    targets = (() if case.most is None else (Target("time_ratio", case.most),)) + (SAME_ERROR,)
    return dataclasses.replace(
        problem, exact=exact, targets=targets, times_one=True, compares="iteration_seconds", limits=limits
    )


BUILDERS: dict[str, Callable[[Case, Peers, Config], Problem]] = {
    "fit": fit_problem,
    "values": values_problem,
    "exact": exact_problem,
    "palettes": palettes_problem,
    "lloyd": lloyd_problem,
    "curve": curve_problem,
}


def main(config: Config) -> dict[str, Any]:
    """Runs every problem; returns `{"config", "device", "rows", "scaling"}`, written and drawn after each."""
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    peers = find_peers(jax.default_backend(), console.print)
    found: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "device": jax.devices()[0].device_kind,
        "rows": [],
        "scaling": [],
    }
    for case in config.cases:
        found["rows"] += run(case, peers, config, console)
        save(found, config)
    for network, methods in config.cold:
        for method in track(methods, f"cold processes: {network}", console=console, transient=True):
            found["rows"].append(cold_row(network, method))
            save(found, config)
        show(console, found["rows"][-len(methods) :])
    if config.scaling is not None:
        for axis, case in config.scaling.cases():
            sizes = {"axis": axis, "points": case.points, "entries": case.k, "dim": case.dim}
            found["scaling"] += [sizes | row for row in run(case, peers, config, console)]
            save(found, config)
    draw(found, config)
    console.print(f"written to {config.out}")
    return found


def run(case: Case, peers: Peers, config: Config, console: Console) -> list[Row]:
    """The rows of one case, shown as they come; one row that says so if it cannot even begin."""
    try:
        problem = BUILDERS[case.kind](case, peers, config)
        rows = race(
            problem,
            seed=config.seed,
            track=lambda turns, text: track(turns, text, console=console, transient=True),
        )
    except Exception as error:  # the other cases go on
        rows = [failed_row(case.title(), "jaxvq", error)]
    problem = None
    forget(peers)
    show(console, rows)
    return [{"case": case.name} | row for row in rows]


def failed_row(problem: str, contender: str, error: Exception) -> Row:
    return {"problem": problem, "contender": contender, "failed": f"failed: {type(error).__name__}: {str(error)[:200]}"}


def cold_row(network: str, method: str) -> Row:
    """A network quantized by one method in a process of its own."""
    row: Row = {"case": "cold", "problem": f"cold process: {network}", "contender": f"jaxvq, {method}", "judged": True}
    try:
        row |= in_cold_process(network, method)
    except Exception as error:  # the other rows go on
        return row | failed_row(row["problem"], row["contender"], error)
    targets = [Target("fit_palettes_programs", 6), Target("fit_product_programs", 6)]
    if network.startswith("tradeoff"):
        targets.append(Target("seconds", 10.0))
    return row | {"compares": "seconds", "targets": [target.judge(row) for target in targets]}


def save(found: dict[str, Any], config: Config) -> None:
    text = json.dumps(found, indent=2, default=str) + "\n"
    (config.out / "results.json").write_text(text)
    if config.json is not None:
        config.json.write_text(text)


def draw(found: dict[str, Any], config: Config) -> None:
    if found["rows"]:
        draw_race(found["rows"], found["device"]).savefig(config.out / "bench_kmeans.png", dpi=120)
    if found["scaling"]:
        draw_scaling(found["scaling"], found["device"]).savefig(config.out / "bench_kmeans_scaling.png", dpi=120)


def cli(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these rows, cold or scaling")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the results to FILE too")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", default=Config.out)
    given = parser.parse_args(arguments)
    backend = "gpu" if jax.default_backend() == "gpu" else "cpu"
    config = SMOKE[backend] if given.smoke else {"cpu": CPU, "gpu": GPU}[backend]
    if given.only:
        try:
            config = config.only(given.only)
        except ValueError as error:
            parser.error(str(error))
    return main(dataclasses.replace(config, json=given.json, out=given.out))


if __name__ == "__main__":
    cli()
