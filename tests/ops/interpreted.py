"""Kernels of `jaxvq.ops` on the CPU, in the place of those on a GPU."""

import functools

import jax
import numpy as np

from jaxvq.ops import cuda
from jaxvq.ops import matmul as door
from tests.ops import ptx


def launch(name, constants, result, *operands, order, blocks, threads, shared_nbytes=0, cluster=1):
    """`cuda.launch` without a GPU: the same assembly, interpreted. What it does not write is NaN."""
    architecture = cuda.OF_CLUSTERS if cluster > 1 else cuda.ARCHITECTURE
    assembly = cuda.assemble(name, tuple(sorted(constants.items())), architecture)
    grid = {"blocks": blocks, "threads": threads, "shared_nbytes": shared_nbytes, "cluster": cluster}

    def run(*operands):
        got = np.full(result.shape, np.nan, result.dtype)
        ptx.run(assembly, [np.asarray(operand) for operand in operands], [got], order=order, **grid)
        return got

    return jax.pure_callback(run, result, *operands, vmap_method="sequential")


def as_if_for_cuda(*operands, default=None, cuda=None, **others):
    """`lax.platform_dependent` that takes the program for NVIDIA's chips."""
    return (cuda or default)(*operands)


def interpret(monkeypatch, order=0):
    """Has kernels interpreted until `monkeypatch` ends. Needs the compiler."""
    monkeypatch.setattr(cuda, "launch", functools.partial(launch, order=order))
    monkeypatch.setattr(jax.lax, "platform_dependent", as_if_for_cuda)
    monkeypatch.setattr(door, "_reason_of_place", lambda x: None)
    forget()


def forget():
    """What was traced does not know how kernels are run now."""
    door._fused.clear_cache()
    door._of_slice.clear_cache()
