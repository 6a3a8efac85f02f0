"""A race of ways to cluster the same values: what they are given, their turns, their errors, and what limits them."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxvq.ops import clustering

SCORES_AT_ONCE = {"cpu": 2**19, "gpu": 2**27}
MESSAGE_LENGTH = 200
SORT_MOVES = 9  # of a value by a radix sort of 32 bits, 8 at a time: it counts, then reads and writes four times
SHARED_NBYTES = 227 * 1024  # of one processor of the chip; a row that fits is read and written once

Fit = Callable[[int, int], Any]  # from a seed and a number of iterations to finished codebooks [p, k, d]
Row = dict[str, Any]
Track = Callable[[range, str], Iterable[int]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to fit codebooks.

    Attributes:
      name: what it is called.
      prepare: moves the data to where it is needed and returns the fit.
      runs: how often it is timed; 0 if only its error is wanted.
      warm_calls: calls with each number of iterations before the clock counts.
      judged: whether the targets are for it.
      optimal: it finishes, whatever the number of iterations.
      fetch: makes a NumPy array of its result.
    """

    name: str
    prepare: Callable[[], Fit]
    runs: int
    warm_calls: int = 1
    judged: bool = False
    optimal: bool = False
    fetch: Callable[[Any], np.ndarray] = np.asarray


@dataclasses.dataclass(frozen=True)
class Target:
    """`quantity`, a field of a row, is to be at most `most`."""

    quantity: str
    most: float

    def judge(self, row: Row) -> dict[str, Any]:
        """The target, what was got (None where there is nothing to compare with), and whether that is met."""
        got = row.get(self.quantity)
        return {
            "quantity": self.quantity,
            "most": self.most,
            "got": got,
            "met": None if got is None else got <= self.most,
        }


@dataclasses.dataclass(frozen=True)
class Problem:
    """Values to cluster and who does it.

    Attributes:
      name: for people.
      points: `[p, n, d]`, p independent sets.
      k: entries of each codebook.
      iterations: of Lloyd.
      contenders: in the order of their turns.
      rival: the contender whose time is 1 in the ratios.
      exact: the contender whose error is 1 in the ratios.
      targets: for the judged contender.
      times_one: one iteration is timed too, and all runs start alike: their difference is the time of an iteration.
      compares: "iteration_seconds" or "seconds", of the whole call: what the ratios of times are of.
      limits: seconds that each resource of the chip takes at least, of what is compared.
      optimum: from values `[n]` to the best codebook `[k]`, for the error's distance from it.
      check: whether errors are measured.
    """

    name: str
    points: Float[Array, "p n d"]
    k: int
    iterations: int
    contenders: tuple[Contender, ...]
    rival: str
    exact: str
    targets: tuple[Target, ...] = ()
    times_one: bool = False
    compares: str = "seconds"
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    optimum: Callable[[np.ndarray], np.ndarray] | None = None
    check: bool = True


@dataclasses.dataclass
class Record:
    """What is known of a contender so far; `seconds` by the number of iterations."""

    contender: Contender
    fit: Fit | None = None
    first: tuple[int, float] | None = None
    seconds: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    errors: list[float] = dataclasses.field(default_factory=list)
    codebooks: np.ndarray | None = None
    failed: str | None = None

    def of(self, iterations: int) -> float | None:
        """The median time of so many iterations."""
        times = self.seconds.get(iterations)
        return statistics.median(times) if times else None


def race(problem: Problem, *, seed: int, track: Track) -> list[Row]:
    """Times the contenders in turns, after one call of each that compiles; a row for each.

    Whoever fails gets a row that says so and has no more turns.
    """
    records = [Record(contender) for contender in problem.contenders]
    for number in track(range(len(records)), f"{problem.name}: compiling"):
        guarded(records[number], functools.partial(warm, problem, records[number], seed))
    for turn in track(range(max((c.runs for c in problem.contenders), default=0)), f"{problem.name}: timing"):
        for record in records:
            if turn < record.contender.runs:
                guarded(record, functools.partial(take_turn, problem, record, seed + turn))
    return as_rows(problem, records)


def guarded(record: Record, step: Callable[[], None]) -> None:
    """Takes a step unless something has failed before; a failure is written down."""
    if record.failed is not None:
        return
    try:
        step()
    except Exception as error:  # whatever goes wrong in one package, the others go on
        message = (str(error).strip() or "no message").splitlines()[0][:MESSAGE_LENGTH]
        record.failed = f"failed: {type(error).__name__}: {message}"
        record.fit = None


def counts(problem: Problem, contender: Contender) -> tuple[int, ...]:
    """The numbers of iterations that are timed."""
    return (1, problem.iterations) if problem.times_one and not contender.optimal else (problem.iterations,)


def warm(problem: Problem, record: Record, seed: int) -> None:
    record.fit = record.contender.prepare()
    if not record.contender.runs:
        check(problem, record, record.fit(seed, problem.iterations))
        return
    for count in counts(problem, record.contender):
        for _ in range(record.contender.warm_calls):
            _, seconds = timed(record.fit, seed, count)
            record.first = record.first or (count, seconds)


def take_turn(problem: Problem, record: Record, seed: int) -> None:
    assert record.fit is not None
    for count in counts(problem, record.contender):
        result, seconds = timed(record.fit, seed, count)
        record.seconds.setdefault(count, []).append(seconds)
        if count == problem.iterations and (not record.errors or not problem.times_one):
            check(problem, record, result)


def timed(fit: Fit, seed: int, iterations: int) -> tuple[Any, float]:
    start = time.perf_counter()
    result = fit(seed, iterations)
    return result, time.perf_counter() - start


def check(problem: Problem, record: Record, result: Any) -> None:
    """Writes down the codebooks and their error."""
    if problem.check:
        record.codebooks = np.asarray(record.contender.fetch(result), np.float32)
        record.errors.append(mean_squared_error(problem.points, record.codebooks))


def as_rows(problem: Problem, records: list[Record]) -> list[Row]:
    """A row for each contender, with ratios to the rival's time and to the exact one's error."""
    rows = [as_row(problem, record) for record in records]
    quantity = problem.compares
    rival = next((row for row in rows if row["contender"] == problem.rival), {})
    exact = next((row for row in rows if row["contender"] == problem.exact), {})
    for row, record in zip(rows, records, strict=True):
        row["time_ratio"] = ratio(row[quantity], rival.get(quantity))
        row["distortion_ratio"] = ratio(row["distortion"], exact.get("distortion"))
        if not record.contender.judged:
            continue
        if record.codebooks is not None and problem.optimum is not None:
            row["optimum_ratio"] = distance_from_optimum(problem, record.codebooks)
        if problem.limits:
            row["limits"] = problem.limits
            row["limited_by"] = max(problem.limits, key=lambda name: problem.limits[name])
            row["times_limit"] = ratio(row[quantity], problem.limits[row["limited_by"]])
        row["targets"] = [target.judge(row) for target in problem.targets]
    return rows


def as_row(problem: Problem, record: Record) -> Row:
    one, whole = record.of(1), record.of(problem.iterations)
    iteration = None
    if one is not None and whole is not None and problem.iterations > 1 and whole > one:
        iteration = (whole - one) / (problem.iterations - 1)
    first_count, first = record.first or (None, None)
    later = None if first_count is None else record.of(first_count)
    return {
        "problem": problem.name,
        "contender": record.contender.name,
        "judged": record.contender.judged,
        "compares": problem.compares,
        "iterations": None if record.contender.optimal else problem.iterations,
        "first_seconds": first,
        "compile_seconds": None if first is None or later is None else max(first - later, 0.0),
        "seconds": whole,
        "iteration_seconds": iteration,
        "distortion": statistics.median(record.errors) if record.errors else None,
        "failed": record.failed,
    }


def ratio(value: float | None, reference: float | None) -> float | None:
    """`value / reference`, or None where either is missing."""
    return None if value is None or not reference else value / reference


def distance_from_optimum(problem: Problem, codebooks: np.ndarray, rows: int = 4) -> float | None:
    """The error over that of the best codebooks, on the first few rows; None if that fails."""
    assert problem.optimum is not None
    try:
        values = np.asarray(problem.points[:rows])
        best = np.stack([problem.optimum(row[:, 0]) for row in values])[..., None]
        return ratio(mean_squared_error(values, codebooks[:rows]), mean_squared_error(values, best))
    except Exception:  # it is only a comparison
        return None


def mean_squared_error(points: Any, codebooks: np.ndarray) -> float:
    """The mean squared difference, per value, of `[p, n, d]` to the nearest of `[p, k, d]`.

    It shares no code with the library: single values are sorted into a sorted codebook, vectors compared in float32.
    """
    if points.shape[2] == 1:
        sums = [squared_error_of_values(x[:, 0], c[:, 0]) for x, c in zip(np.asarray(points), codebooks, strict=True)]
    else:
        sums = [float(squared_error_of_vectors(x, jnp.asarray(c))) for x, c in zip(points, codebooks, strict=True)]
    return sum(sums) / points.size


def squared_error_of_values(values: np.ndarray, codebook: np.ndarray) -> float:
    table = np.sort(codebook)
    nearest = table[np.searchsorted((table[1:] + table[:-1]) / 2, values)]
    return float(np.sum((values - nearest) ** 2, dtype=np.float64))


@jax.jit
def squared_error_of_vectors(points: Float[Array, "n d"], codebook: Float[Array, "k d"]) -> Float[Array, ""]:
    return jnp.sum((points - codebook[float32_codes(points, codebook)]) ** 2)


def float32_codes(points: Float[Array, "n d"], codebook: Float[Array, "k d"]) -> Int32[Array, " n"]:
    """The nearest codebook vectors, with products and sums in float32 throughout."""
    (n, d), k = points.shape, codebook.shape[0]
    length = min(n, max(1, SCORES_AT_ONCE.get(jax.default_backend(), 2**19) // k))
    padded = jnp.pad(points, ((0, -n % length), (0, 0))).reshape(-1, length, d)
    halves = 0.5 * jnp.sum(codebook**2, axis=1)

    def codes_of(x: Float[Array, "length d"]) -> Int32[Array, " length"]:
        return jnp.argmin(halves - jnp.matmul(x, codebook.T, precision=lax.Precision.HIGHEST), axis=1).astype(jnp.int32)

    return lax.map(codes_of, padded).reshape(-1)[:n]


@jax.jit
def float32_lloyd(
    points: Float[Array, "n d"], centroids: Float[Array, "k d"], iterations: Int32[Array, ""]
) -> Float[Array, "k d"]:
    """Lloyd's iteration as plainly as it goes; a centroid without points stays."""
    k = centroids.shape[0]

    def move(_: Array, centroids: Float[Array, "k d"]) -> Float[Array, "k d"]:
        codes = float32_codes(points, centroids)
        sums = jax.ops.segment_sum(points, codes, k)
        mass = jax.ops.segment_sum(jnp.ones_like(codes, jnp.float32), codes, k)[:, None]
        return jnp.where(mass > 0, sums / jnp.maximum(mass, 1), centroids)

    return lax.fori_loop(0, iterations, move, centroids)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do in a second, measured with large transfers and products.

    Attributes:
      nbytes: moved to and from its memory.
      half_flops: of its matrix units on half-precision numbers; a multiply-add counts two.
      lanes: comparisons of float32 numbers: processors times lanes times clock.
    """

    nbytes: float
    half_flops: float
    lanes: float


H200 = Chip(nbytes=4.3e12, half_flops=790e12, lanes=132 * 64 * 1.755e9)


def chip() -> Chip | None:
    """The first device's, where its figures are known."""
    return H200 if "H200" in jax.devices()[0].device_kind else None


def lloyd_limits(n: int, d: int, k: int, on: Chip | None) -> dict[str, float]:
    """Seconds that each resource takes at least for an iteration with matrix units; nothing for a chip unknown.

    Bytes: the points are read once. Matrix units: products of 16 x 16 by 16 x 8 numbers, for as many columns as the
    kernel makes of d values. Argmin: a tile of 16 x 8 scores is four in each lane, each compared once.
    """
    if on is None:
        return {}
    columns, entries = 16 * clustering._steps(d, exact=False), -(-k // 8) * 8
    return {
        "bytes": 4 * n * d / on.nbytes,
        "matrix units": 2 * n * entries * columns / on.half_flops,
        "argmin": n * entries / on.lanes,
    }


def sort_limits(p: int, n: int, on: Chip | None) -> dict[str, float]:
    """Seconds to move p rows of n values as a sort does, and to read them once more for their sums."""
    if on is None:
        return {}
    moves = (2 if 4 * n <= SHARED_NBYTES else SORT_MOVES) + 1
    return {"bytes": 4 * p * n * moves / on.nbytes}
