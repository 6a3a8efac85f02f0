"""How few bytes does a dense network for MNIST need: single values against vectors, and row VQ as it was printed.

Runs a published set-up as printed and shows which of its numbers cannot come from it. Then measures accuracy against
size over a grid of rates, and again with the centroids of vectors quantized in turn. The networks of all seeds are
stacked and train at once. What is chosen is chosen by training images that were held out.

    python -m experiments.mnist_rates [--dataset digits|mnist] [--smoke] [--out DIR] [--seeds N]
"""

import dataclasses
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.console
import rich.progress
from jaxtyping import Array, Float, Int

import jaxvq
import jaxvq.linen
from experiments.data import Dataset, DatasetUnavailableError, load
from experiments.mnist_mlp import (
    Data,
    Images,
    Network,
    Training,
    Variables,
    all_variants,
    as_data,
    begin,
    epoch,
    hold_out,
)
from experiments.rate_curves import (
    ALL_BUT_LAST,
    EVERY_LAYER,
    FLOAT,
    ROWS,
    SCALAR,
    VECTOR,
    Row,
    draw_rates,
    draw_rows,
    smallest_sizes,
    tables,
)
from experiments.train import options
from jaxvq import Codebook, KMeans, Product, QuantizedArray, Residual, RowVQ, Rule, Uniform, dequantize_params
from jaxvq.array import is_quantized
from jaxvq.methods import AbstractMethod

W4A4 = "W4A4, tracked range"  # of the variants of `mnist_mlp`
LARGEST_INT8 = 127
THREADS = 8

Params = Any  # the parameters of the networks of all seeds, which are the first axis of each array
Orders = Int[Array, "seeds steps b"]
Track = Callable[..., Iterable[Any]]
Store = Callable[[Array], Codebook | list[QuantizedArray]]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to quantize the trained networks.

    Attributes:
      kind: of what the first layer becomes codes of.
      family: ways that differ in their rate alone.
      label: the rate.
      methods: for each of the three layers; None leaves it float.
    """

    kind: str
    family: str
    label: str
    methods: tuple[AbstractMethod | None, AbstractMethod | None, AbstractMethod | None]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      dataset: "digits" or "mnist".
      seeds: how many networks are trained.
      first: the training of the float networks.
      warm_up: how many epochs more they train before W4A4, and from there before their weights become codes.
      printed: row VQ as it was published.
      published: the training of its codebooks.
      trainings: of codebooks in the grid, of which held-out images choose one for each kind.
      ways: of the grid of rates; the choice is made for the first of each kind.
      centroids: methods that the centroids of vectors become codes of, beside bfloat16 and int8.
      out: the folder to write to.
    """

    dataset: str
    seeds: int
    first: Training
    warm_up: tuple[int, int]
    printed: Way
    published: Training
    trainings: tuple[Training, ...]
    ways: tuple[Way, ...]
    centroids: tuple[AbstractMethod, ...]
    out: pathlib.Path


def rows(fraction: float, *, last: bool) -> Way:
    """Row VQ of every layer, or of all but the last one."""
    method = RowVQ(fraction=fraction)
    return Way(ROWS, EVERY_LAYER if last else ALL_BUT_LAST, f"{fraction:g}", (method, method, method if last else None))


def all_ways() -> tuple[Way, ...]:
    """The grid. The first layer has 92% of the weights; the others are 4-bit palettes but in row VQ."""
    small = KMeans(bits=4)
    methods: list[tuple[str, str, str, AbstractMethod]] = []
    methods += [(SCALAR, "palette", f"{bits} bit", KMeans(bits=bits)) for bits in (3, 1, 2, 4, 5)]
    methods += [(SCALAR, "palette per channel", f"{bits} bit", KMeans(bits=bits, per="channel")) for bits in (1, 2)]
    methods += [(SCALAR, "levels", f"{bits} bit", Uniform(bits=bits)) for bits in (2, 3, 4)]
    methods += [(SCALAR, "levels per channel", f"{bits} bit", Uniform(bits=bits, per="channel")) for bits in (2, 3)]
    cuts = ((64, 4), (16, 2), (64, 2), (16, 4), (256, 4), (16, 8), (64, 8), (256, 8))
    methods += [(VECTOR, f"product, d={dim}", f"k={k}", Product(k=k, dim=dim)) for k, dim in cuts]
    sums = ((2, 16), (2, 64), (2, 256))
    methods += [(VECTOR, "residual, d=8", f"{m} x k={k}", Residual(stages=m, k=k, dim=8)) for m, k in sums]
    fractions = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    whole = [rows(fraction, last=last) for last in (False, True) for fraction in fractions]
    ways = [Way(kind, family, label, (method, small, small)) for kind, family, label, method in methods]
    return (Way(FLOAT, FLOAT, "", (None, None, None)), *ways, *whole)


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment.

    Returns:
      What it found, also written to `results.json`: the published set-up as printed, the training chosen for each
      kind, a row for each way, and the smallest sizes that lose at most one point.

    Raises:
      DatasetUnavailableError: when the data is not to be had.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    dataset = load(config.dataset)
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bars:
        printed = as_printed(dataset, config, track=bars.track)
        chosen, found = study(dataset, config, track=bars.track)
    results = {"dataset": config.dataset, "seeds": config.seeds, "printed": printed, "trainings": chosen}
    results |= {"smallest": smallest_sizes(found), "rows": found}
    rich.print(*tables(results), sep="\n")
    draw_rates(results).savefig(config.out / "mnist_rates.png", dpi=150)
    draw_rows(results).savefig(config.out / "mnist_rates_rows.png", dpi=150)
    (config.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    rich.print(f"written to {config.out}: mnist_rates.png, mnist_rates_rows.png, results.json")
    return results


def as_printed(dataset: Dataset, config: Config, *, track: Track) -> dict[str, Any]:
    """The published set-up on all training images: a value per seed for each of its numbers."""
    train = as_data(dataset.train_images, dataset.train_labels)
    test = as_data(dataset.test_images, dataset.test_labels)
    warm, losses = warm_up(train, config, track=track)
    _, medium, long = warm.values()
    literal = dequantize_params(fine_tune(quantize(long, config.printed), config.published, train))
    biases = np.asarray(literal["Dense_2"]["bias"])
    return {
        "epochs": list(warm),
        "losses": losses,
        "float": [measure(params, test)[1] for params in warm.values()],
        "w4a4": rounded(medium, train, test, config),
        "rows": measure(literal, test)[1],
        "spread": spread_of_logits(literal, test[0]),
        "share": [float(np.mean(np.asarray(test[1]) == bias.argmax())) for bias in biases],
    }


def warm_up(data: Data, config: Config, *, track: Track) -> tuple[dict[int, Params], list[list[float]]]:
    """Float networks by the epochs they trained for, and the mean loss of the training images after each epoch."""
    ends = list(itertools.accumulate((config.first.epochs, *config.warm_up)))
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    params = _start(keys, data[0][:1])
    one = dataclasses.replace(config.first, epochs=1)
    kept, losses = {}, []
    for done in track(range(1, ends[-1] + 1), description="float networks"):
        params = fit_all(Network(), one, {"params": params}, data, first_seed=done * config.seeds)["params"]
        losses.append(measure(params, data)[0])
        if done in ends:
            kept[done] = params
    return kept, losses


@jax.jit
def _start(keys: Array, images: Images) -> Params:
    return jax.vmap(lambda key: Network().init(key, images))(keys)["params"]


def fit_all(network: Network, training: Training, variables: Variables, data: Data, *, first_seed: int) -> Variables:
    """`mnist_mlp.fit` of the networks of all seeds at once, each with its own order of the images."""
    steps = len(data[0]) // training.batch_size
    count = len(jax.tree.leaves(variables)[0])
    generators = [np.random.default_rng(first_seed + seed) for seed in range(count)]
    state = jax.vmap(training.optimizer(steps).init)(variables["params"])
    for _ in range(training.epochs):
        used = [generator.permutation(len(data[0]))[: steps * training.batch_size] for generator in generators]
        orders = jnp.asarray(np.stack(used).reshape(count, steps, -1))
        variables, state = _epochs(network, training, variables, state, data, orders)
    return variables


@partial(jax.jit, static_argnums=(0, 1))
def _epochs(
    network: Network, training: Training, variables: Variables, state: Any, data: Data, orders: Orders
) -> tuple[Variables, Any]:
    return jax.vmap(partial(epoch, network, training), in_axes=(0, 0, None, 0))(variables, state, data, orders)


def rounded(params: Params, train: Data, test: Data, config: Config) -> list[float]:
    """The accuracies of 4-bit weights and activations, of the codes that the trained weights become."""
    variant = next(one for one in all_variants(config.first.batch_size) if one.name == W4A4)
    network, key = variant.network, jax.random.key(0)
    before = jax.jit(jax.vmap(lambda one: begin(variant, one, train[0], key=key)))(params)
    after = fit_all(network, variant.training, before, train, first_seed=1_000)
    codes = jax.jit(jax.vmap(lambda one: jaxvq.linen.harden(network, one, train[0][:1], key=key)))(after)
    return measure_variables(network, after | jaxvq.linen.to_variables(codes), test)[1]


def quantize(params: Params, way: Way) -> Params:
    """Stacked float parameters as codes, each seed's by themselves."""
    rules = [Rule(f"Dense_{index}/kernel", method, stacked=1) for index, method in enumerate(way.methods)]
    return jaxvq.quantize_params(params, rules, key=jax.random.key(0))


def fine_tune(params: Params, training: Training, data: Data) -> Params:
    """Trains what is not codes."""
    variables = jaxvq.linen.to_variables(params)
    return jaxvq.linen.from_variables(fit_all(Network(), training, variables, data, first_seed=1_000))


def nbytes_of(params: Params) -> int:
    """Bytes of one of the networks: everything counted, but for a file's header."""
    leaves = jax.tree.leaves(params)
    return sum(leaf.nbytes for leaf in leaves) // len(leaves[0])


def measure(params: Params, data: Data) -> tuple[list[float], list[float]]:
    """The mean loss and the accuracy of each network, its codes decoded."""
    return measure_variables(Network(), {"params": dequantize_params(params)}, data)


def measure_variables(network: Network, variables: Variables, data: Data) -> tuple[list[float], list[float]]:
    """The mean loss and the accuracy of each network."""
    losses, correct = _scores(network, variables, data)
    return losses.tolist(), [int(count) / len(data[0]) for count in correct]


@partial(jax.jit, static_argnums=0)
def _scores(network: Network, variables: Variables, data: Data) -> tuple[Float[Array, " seeds"], Int[Array, " seeds"]]:
    def one(variables: Variables) -> tuple[Array, Array]:
        logits = jaxvq.linen.apply(network, variables, data[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, data[1])
        return losses.mean(), jnp.sum(jnp.argmax(logits, axis=-1) == data[1])

    return jax.vmap(one)(variables)


def spread_of_logits(params: Params, images: Images) -> list[float]:
    """How far the logits of an image lie apart, but for the bias: the largest difference over all images."""
    last = params["Dense_2"]
    bare = params | {"Dense_2": last | {"bias": jnp.zeros_like(last["bias"])}}
    logits: Any = jax.jit(jax.vmap(lambda one: Network().apply({"params": one}, images)))(bare)
    return jnp.max(jnp.ptp(logits, axis=-1), axis=-1).tolist()


def study(dataset: Dataset, config: Config, *, track: Track) -> tuple[dict[str, str], list[Row]]:
    """The training that held-out images choose for each kind of way, and a row for each way."""
    split = hold_out(dataset)
    train, held_out = as_data(split.train_images, split.train_labels), as_data(split.test_images, split.test_labels)
    test = as_data(dataset.test_images, dataset.test_labels)
    params = warm_up(train, config, track=track)[0].popitem()[1]
    stores: dict[str, Store] = {"bfloat16": in_bfloat16, "int8": in_int8}
    stores |= {str(method): partial(in_codes, method=method) for method in config.centroids}

    def score(one: tuple[str, Training]) -> float:
        kind, training = one
        return float(np.mean(measure(fine_tune(started[kind], training, train), held_out)[1]))

    first_of = {way.kind: way for way in reversed(config.ways)}
    started = {kind: quantize(params, way) for kind, way in first_of.items()}
    tries = list(itertools.product(started, config.trainings))
    scores = side_by_side(score, tries, track=track, description="how to train codebooks")
    accuracies = dict(zip(tries, scores, strict=True))
    chosen = {kind: max(config.trainings, key=lambda one: accuracies[kind, one]) for kind in started}

    def row(way: Way) -> Row:
        before = quantize(params, way)
        after = fine_tune(before, chosen[way.kind], train)
        found = {"kind": way.kind, "family": way.family, "label": way.label, "nbytes": nbytes_of(after)}
        found |= {"before": measure(before, test)[1], **tested(after, held_out, test)}
        small = []
        for name, store in stores.items() if way.kind in (VECTOR, ROWS) else ():
            stored, nbytes = with_centroids(after, store)
            small.append({"stored": name, "nbytes": nbytes, **tested(stored, held_out, test)})
        return found | {"centroids": small}

    found = side_by_side(row, config.ways, track=track, description="rates")
    return {kind: f"{'Adam' if one.adam else 'SGD'} {one.rate:g}" for kind, one in chosen.items()}, found


def side_by_side(work: Callable[[Any], Any], items: Sequence[Any], *, track: Track, description: str) -> list[Any]:
    """`work` of each item, in threads: each item has a program of its own, and they compile at the same time."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(track(pool.map(work, items), total=len(items), description=description))


def tested(params: Params, held_out: Data, test: Data) -> Row:
    """The accuracy of each network on both sets of images."""
    return {"held_out": measure(params, held_out)[1], "accuracy": measure(params, test)[1]}


def in_bfloat16(vectors: Float[Array, "seeds 1 1 m k d"]) -> Codebook:
    """Centroids with 8 bits of precision."""
    return Codebook(vectors.astype(jnp.bfloat16))


def in_int8(vectors: Float[Array, "seeds 1 1 m k d"]) -> Codebook:
    """Centroids as whole numbers in units of a scale for each stage."""
    largest = jnp.max(jnp.abs(vectors), axis=(4, 5), keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST_INT8, 1)
    return Codebook(jnp.round(vectors / scale).astype(jnp.int8), scale)


def in_codes(vectors: Float[Array, "seeds 1 1 m k d"], method: AbstractMethod) -> list[QuantizedArray]:
    """Centroids as codes of a method, for each stage: a codebook is a weight like any other."""
    tables = [vectors[:, 0, 0, stage] for stage in range(vectors.shape[3])]
    return jaxvq.quantize_params(tables, [Rule(".*", method, stacked=1)], key=jax.random.key(0))


def with_centroids(params: Params, store: Store) -> tuple[Params, int]:
    """The parameters once the centroids of vectors are stored so, ready to decode, and the bytes of one network."""
    saved = 0

    def change(leaf: Any) -> Any:
        nonlocal saved
        if not is_quantized(leaf) or leaf.layout.dim == 1:
            return leaf
        stored = store(leaf.decoder.vectors)
        saved += nbytes_of(leaf.decoder) - nbytes_of(stored)
        if isinstance(stored, list):
            stored = Codebook(jnp.stack([table.dequantize() for table in stored], axis=1)[:, None, None])
        return dataclasses.replace(leaf, decoder=stored)

    small = jax.tree.map(change, params, is_leaf=is_quantized)
    return small, nbytes_of(params) - saved


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line asks for."""
    asked = options(arguments, name="mnist_rates", description=__doc__)
    first = Training(5, 0.1, batch_size=64 if asked.dataset == "mnist" else 16)
    published = dataclasses.replace(first, rate=1e-3)
    adam = tuple(dataclasses.replace(published, rate=rate, adam=True) for rate in (3e-4, 1e-3, 3e-3))
    codes = (Uniform(bits=4), KMeans(bits=4))
    if not asked.smoke:
        tenth = rows(0.1, last=True)
        return Config(asked.dataset, asked.seeds, first, (10, 15), tenth, published, adam, all_ways(), codes, asked.out)
    # One layer at a time and one way to train, which is few programs to compile.
    ways = (
        Way(FLOAT, FLOAT, "", (None, None, None)),
        Way(SCALAR, "levels", "4 bit", (Uniform(bits=4), None, None)),
        Way(VECTOR, "product, d=4", "k=16", (None, Product(k=16, dim=4), None)),
    )
    tenth = Way(ROWS, EVERY_LAYER, "0.1", (None, None, RowVQ(fraction=0.1)))
    return Config(asked.dataset, 1, first, (1, 1), tenth, published, (published,), ways, codes[:1], asked.out)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except DatasetUnavailableError as unavailable:
        sys.exit(f"error: {unavailable}")
