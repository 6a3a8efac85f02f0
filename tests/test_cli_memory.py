"""The command line streams: its memory depends on the largest tensor, not on the checkpoint."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq import cli
from jaxvq._container import tensor_of
from jaxvq._writer import Writer

MEMORY = """
import re, sys
from jaxvq import cli
def peak():  # unlike `resource.getrusage`, this does not begin with the peak of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
folder, command, *options = sys.argv[1:]
def run(name):
    output = [] if command == "inspect" else ["-o", f"{folder}/{name}.{command}", "--force"]
    assert cli.main([command, f"{folder}/{name}", *output, *options]) == 0
run("small")  # the fixed base: everything imported, compiled and set up, and the scratch space of any tensor
base = peak()
run("large")
print(peak() - base, file=sys.stderr)
"""
SMALL, LARGEST = 24 * 2**20, 128 * 2**20  # bytes of a tensor


def peak_ratio(folder, *arguments):
    """The memory that a command takes for the file `large`, in units of its largest tensor."""
    command = [sys.executable, "-c", MEMORY, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1]) / LARGEST


@pytest.fixture(params=["float32", "bfloat16"])
def large_checkpoint(tmp_path, request):
    """The folder of two checkpoints, `small` and `large`, of two tensors each."""
    dtype = jnp.dtype(request.param)
    for name, nbytes in (("small", SMALL), ("large", LARGEST)):
        shape = (nbytes // dtype.itemsize // 4096, 4096)
        tensors = [tensor_of(f"{layer}.weight", jax.ShapeDtypeStruct(shape, dtype)) for layer in "ab"]
        with Writer(tmp_path / name, tensors, {}) as writer:
            for seed, tensor in enumerate(tensors):
                values = np.random.default_rng(seed).standard_normal(shape, np.float32)
                writer.write(tensor.name, values.astype(dtype))
    return tmp_path


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    "options",
    ["--method uniform", "--bits 4", "--bits 4 --per channel", "--method product --bits 4 --dim 8"],
)
def test_quantize_takes_at_most_four_tensors(large_checkpoint, options):
    assert peak_ratio(large_checkpoint, "quantize", *options.split()) < 4


@pytest.mark.slow
@needs_proc
def test_inspect_and_dequantize_take_at_most_three_tensors(large_checkpoint):
    for name in ("small", "large"):
        plain = large_checkpoint / name
        assert cli.main(["quantize", str(plain), "-o", f"{plain}.q", "--method", "uniform"]) == 0
        os.replace(f"{plain}.q", plain)
    assert peak_ratio(large_checkpoint, "inspect") < 3
    assert peak_ratio(large_checkpoint, "dequantize") < 3
