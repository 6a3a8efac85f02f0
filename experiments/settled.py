"""The state that a GPU is in before kernels of a few microseconds are timed."""

import jax
import jax.numpy as jnp
from jax import lax


def settle() -> None:
    """Brings the GPU into the state of a process that has compiled nothing for a while. Call it before timing.

    To compile a program XLA may time candidates for its kernels. After that each kernel of every CUDA graph of the
    process started about 0.3 microseconds later on an H200 (jaxlib 0.11, driver 580), those of programs compiled
    before too: 526 instead of 475 microseconds for a token of `experiments/bench_decode.py`, 925 instead of 872 in
    bfloat16. It lasted until a program waited for the host on its way, at a loop or a branch, or some fifty small ones
    had run. This runs such a loop. Without XLA the same comes after eight launches outside of graphs, on any stream but
    the default one: an empty kernel of a graph takes 0.19 microseconds more then, one that reads 8 MB 0.4.
    """
    jax.block_until_ready(loop(jnp.float32(4)))


@jax.jit
def loop(turns: jax.Array) -> jax.Array:
    return lax.while_loop(lambda turn: turn < turns, lambda turn: turn + 1, jnp.float32(0))
