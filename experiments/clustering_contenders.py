"""Who clusters in `experiments/bench_kmeans.py`: the library and the packages it is measured against."""

import functools
import gc
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.clustering_race import Contender, Fit, float32_lloyd
from jaxvq.cluster.kmeans import iterate, kmeans, moments_by_chunks
from jaxvq.cluster.palettes import fit_palettes
from jaxvq.cluster.product import fit_product
from jaxvq.cluster.scalar import kmeans1d

Peers = dict[str, Any]
PACKAGES = {
    "cpu": {"faiss": "faiss", "scikit-learn": "sklearn.cluster", "kmeans1d": "kmeans1d"},
    "gpu": {"PyTorch": "torch", "flash-kmeans": "flash_kmeans", "kmeans1d": "kmeans1d"},
}
DISTANCES_AT_ONCE = 2**28
VALUES_FOR_OPTIMUM = 2**20


def find_peers(backend: str, say: Callable[[str], None]) -> Peers:
    """The packages to compare with, by name; None for one that is missing or does not load, which is said."""
    peers: Peers = {}
    for name, module in PACKAGES.get(backend, PACKAGES["cpu"]).items():
        try:
            peers[name] = importlib.import_module(module)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            say(f"{name} {'is not installed' if missing else f'does not load ({error})'}: its rows are left out")
            peers[name] = None
        except Exception as error:  # a package may fail in any way when it looks for a GPU
            say(f"{name} does not load ({type(error).__name__}: {error}): its rows are left out")
            peers[name] = None
    if peers.get("PyTorch") is not None and not peers["PyTorch"].cuda.is_available():
        say("PyTorch sees no GPU: its rows and those of flash-kmeans are left out")
        peers["PyTorch"] = peers["flash-kmeans"] = None
    return peers


def forget(peers: Peers) -> None:
    """Gives memory back between problems.

    flash-kmeans keeps a graph for each shape that reads the points of its first call: with other points of the same
    shape it would compute from memory that is no longer theirs.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("flash_kmeans") and isinstance(getattr(module, "_graph_cache", None), dict):
            module._graph_cache.clear()
    gc.collect()
    if peers.get("PyTorch") is not None:
        peers["PyTorch"].cuda.empty_cache()


def ours_from_keys(points: Float[Array, "1 n d"], k: int, runs: int) -> Contender:
    """k-means++ and Lloyd, as `Product` does it."""

    def fit(seed: int, iterations: int) -> Float[Array, "1 k d"]:
        return jax.block_until_ready(fit_product(jax.random.key(seed), points, k, iterations=iterations))

    return Contender("jaxvq, k-means++ and Lloyd", lambda: fit, runs, judged=True)


def ours_from_random_points(points: Float[Array, "1 n d"], k: int, runs: int) -> Contender:
    """Lloyd as faiss starts it."""

    def fit(seed: int, iterations: int) -> Float[Array, "1 k d"]:
        start = np.random.default_rng(seed).choice(points.shape[1], k, replace=False)
        return jax.block_until_ready(kmeans(points[0], points[0][start], iterations=iterations)[None])

    return Contender("jaxvq, Lloyd from random points", lambda: fit, runs)


def ours_from_start(points: Float[Array, "1 n d"], start: Float[Array, "1 k d"], runs: int) -> Contender:
    def prepare() -> Fit:
        x, c = points[0], start[0]
        return lambda seed, iterations: jax.block_until_ready(kmeans(x, c, iterations=iterations)[None])

    return Contender("jaxvq", prepare, runs, judged=True)


def ours_optimal(points: Float[Array, "p n 1"], k: int, runs: int) -> Contender:
    def prepare() -> Fit:
        values = points[..., 0]
        return lambda seed, iterations: jax.block_until_ready(fit_palettes(values, k)[..., None])

    return Contender("jaxvq, optimal", prepare, runs, judged=True, optimal=True)


def ours_one_dimensional(points: Float[Array, "1 n 1"], k: int, runs: int) -> Contender:
    def prepare() -> Fit:
        values = points[0, :, 0]
        return lambda seed, iterations: jax.block_until_ready(kmeans1d(values, k)[None, :, None])

    return Contender("jaxvq, one-dimensional", prepare, runs, judged=True, optimal=True)


def plain_xla(points: Float[Array, "p n d"], start: Float[Array, "p k d"], runs: int) -> Contender:
    """The library's program for chips without its kernels."""

    def prepare() -> Fit:
        p, n, _ = points.shape
        lloyd = functools.partial(iterate, moments_by=moments_by_chunks, axis_name=None)
        arguments = points, start, jnp.ones((p, n), jnp.float32)
        if p == 1:  # a map over one set could be slower than the set
            program, arguments = jax.jit(lloyd), tuple(array[0] for array in arguments)
        else:
            program = jax.jit(jax.vmap(lloyd, in_axes=(0, 0, 0, None, None, None)))

        def fit(seed: int, iterations: int) -> Float[Array, "p k d"]:
            centroids = program(*arguments, jnp.int32(iterations), jnp.int32(n), jnp.float32(0))[0]
            return jax.block_until_ready(centroids.reshape(start.shape))

        return fit

    return Contender("jaxvq, plain XLA", prepare, runs)


def float32_reference(points: Float[Array, "1 n d"], start: Float[Array, "1 k d"]) -> Contender:
    """Only for its error."""

    def fit(seed: int, iterations: int) -> Float[Array, "1 k d"]:
        return jax.block_until_ready(float32_lloyd(points[0], start[0], jnp.int32(iterations))[None])

    return Contender("float32 reference", lambda: fit, 0)


def flash(peers: Peers, points: Float[Array, "p n d"], start: Float[Array, "p k d"], runs: int) -> list[Contender]:
    """flash-kmeans. Its first call with a shape compiles, the second records a graph that the later ones replay."""
    package, torch = peers.get("flash-kmeans"), peers.get("PyTorch")
    if package is None or torch is None:
        return []

    def prepare() -> Fit:
        x, c = on_gpu(torch, points), on_gpu(torch, start)
        settings = {"n_clusters": start.shape[1], "tol": -1.0, "init_centroids": c}

        def fit(seed: int, iterations: int) -> Any:
            _, centroids, *_ = package.batch_kmeans_Euclid(x, max_iters=iterations, **settings)
            torch.cuda.synchronize()
            return centroids

        return fit

    return [Contender("flash-kmeans", prepare, runs, warm_calls=2, fetch=from_torch)]


def torch_cdist(
    peers: Peers, points: Float[Array, "p n d"], start: Float[Array, "p k d"], runs: int
) -> list[Contender]:
    torch = peers.get("PyTorch")
    if torch is None:
        return []

    def prepare() -> Fit:
        x, c = on_gpu(torch, points), on_gpu(torch, start)

        def fit(seed: int, iterations: int) -> Any:
            centroids = torch_lloyd(torch, x, c, iterations)
            torch.cuda.synchronize()
            return centroids

        return fit

    return [Contender("PyTorch, cdist", prepare, runs, fetch=from_torch)]


def torch_lloyd(torch: Any, x: Any, centroids: Any, iterations: int) -> Any:
    """Lloyd with `torch.cdist`, as many points at a time as there is room for; a centroid without points stays."""
    (p, n, d), k = x.shape, centroids.shape[1]
    first = k * torch.arange(p, device=x.device)[:, None]
    ones = torch.ones(p * n, device=x.device)
    chunks = x.split(max(1, min(n, DISTANCES_AT_ONCE // (p * k))), dim=1)
    for _ in range(iterations):
        codes = torch.cat([torch.cdist(chunk, centroids).argmin(dim=2) for chunk in chunks], dim=1)
        places = (codes + first).reshape(-1)
        sums = torch.zeros(p * k, d, device=x.device).index_add_(0, places, x.reshape(-1, d))
        mass = torch.zeros(p * k, device=x.device).index_add_(0, places, ones)[:, None]
        centroids = torch.where(mass > 0, sums / mass.clamp(min=1), centroids.reshape(-1, d)).reshape(p, k, d)
    return centroids


def on_gpu(torch: Any, values: Float[Array, "..."]) -> Any:
    return torch.tensor(np.asarray(values), device="cuda")


def from_torch(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy()


def faiss_fit(peers: Peers, points: Float[Array, "1 n d"], k: int, runs: int, threads: int) -> list[Contender]:
    """faiss from random points of its own choice."""
    return _faiss(peers, points, k, runs, threads, None)


def faiss_from_start(
    peers: Peers, points: Float[Array, "1 n d"], start: Float[Array, "1 k d"], runs: int, threads: int
) -> list[Contender]:
    return _faiss(peers, points, start.shape[1], runs, threads, np.asarray(start[0]))


def _faiss(
    peers: Peers, points: Float[Array, "1 n d"], k: int, runs: int, threads: int, start: np.ndarray | None
) -> list[Contender]:
    faiss = peers.get("faiss")
    if faiss is None:
        return []

    def prepare() -> Fit:
        faiss.omp_set_num_threads(threads)
        x = np.asarray(points[0])
        settings = {"max_points_per_centroid": len(x), "min_points_per_centroid": 1}

        def fit(seed: int, iterations: int) -> np.ndarray:
            fitted = faiss.Kmeans(x.shape[1], k, niter=iterations, seed=seed + 1, **settings)
            fitted.train(x, init_centroids=start)
            return fitted.centroids[None]

        return fit

    return [Contender("faiss", prepare, runs)]


def scikit_learn(peers: Peers, points: Float[Array, "1 n d"], k: int, **settings: Any) -> list[Contender]:
    cluster = peers.get("scikit-learn")
    if cluster is None:
        return []

    def prepare() -> Fit:
        x = np.asarray(points[0])

        def fit(seed: int, iterations: int) -> np.ndarray:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns when it stops before it converges
                return cluster.KMeans(k, n_init=1, random_state=seed, **settings).fit(x).cluster_centers_[None]

        return fit

    return [Contender("scikit-learn", prepare, 1, warm_calls=0)]


def exact_kmeans1d(peers: Peers, points: Float[Array, "1 n 1"], k: int) -> list[Contender]:
    package = peers.get("kmeans1d")
    if package is None:
        return []

    def prepare() -> Fit:
        values = np.asarray(points[0, :, 0]).tolist()
        return lambda seed, iterations: np.array(package.cluster(values, k).centroids)[None, :, None]

    return [Contender("kmeans1d", prepare, 1, warm_calls=0, optimal=True)]


def optimum(peers: Peers, k: int) -> Callable[[np.ndarray], np.ndarray]:
    """From values to their best codebook, by `kmeans1d` where it is installed and the library's program elsewhere.

    Of more than a million values it takes every so many; its error is then too large by about k in a million.
    """
    package = peers.get("kmeans1d")

    def solve(values: np.ndarray) -> np.ndarray:
        few = values[:: -(-len(values) // VALUES_FOR_OPTIMUM)]
        if package is not None:
            return np.asarray(package.cluster(few.tolist(), k).centroids, np.float32)
        return np.asarray(kmeans1d(jnp.asarray(few), k))

    return solve
