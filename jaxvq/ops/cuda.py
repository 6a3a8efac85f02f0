"""Kernels in CUDA C++, compiled by NVRTC when a program is traced and launched by XLA itself.

`pip install "jaxvq[cuda]"` brings the compiler as a wheel; without it XLA's own programs serve.
"""

import functools
import importlib.resources
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Shaped

# The oldest that have every instruction used, without and with clusters; drivers compile them for their chip.
ARCHITECTURE, OF_CLUSTERS = "compute_80", "compute_90"
SHARED_KIB = {"8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "12.0": 99, "12.1": 99}  # that a block of threads can have
SHARED_KIB_OF_OTHERS = 227  # as on an H100


@functools.cache
def compiler() -> Any:
    """NVRTC, or None where its wheel is missing or its library does not load."""
    try:
        from cuda.bindings import nvrtc  # type: ignore[import-not-found]

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError):
        return None
    return nvrtc


@functools.cache
def shared_nbytes() -> int:
    """Bytes of shared memory that a block of threads can have on the GPU here; 0 where it is too old for the kernels.

    Without a GPU, as when a program is exported, those of an H100.
    """
    major, capability = _capability()
    return 1024 * SHARED_KIB.get(capability, SHARED_KIB_OF_OTHERS) if major >= 8 else 0


def has_clusters() -> bool:
    """Whether blocks of threads can read each other's shared memory on the GPU here; without one, as on an H100."""
    return _capability()[0] >= 9


def _capability() -> tuple[int, str]:
    """(9, "9.0") and the like; those of an H100 without a GPU, (0, ...) for other makers' chips."""
    try:
        capability = str(jax.local_devices(backend="gpu")[0].compute_capability)
    except (RuntimeError, AttributeError):
        capability = "9.0"
    major = capability.split(".")[0]
    return int(major) if major.isdigit() else 0, capability


@functools.cache
def assemble(name: str, constants: tuple[tuple[str, int], ...], architecture: str = ARCHITECTURE) -> str:
    """`kernels/<name>.cu` as PTX, the assembly that any later chip runs, with its open constants filled in.

    Raises:
      RuntimeError: when it does not compile, with the compiler's log.
    """
    nvrtc = compiler()
    files = importlib.resources.files("jaxvq.ops").joinpath("kernels")
    source = files.joinpath(f"{name}.cu").read_bytes()
    headers = [file for file in files.iterdir() if file.name.endswith(".cuh")]
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        "--device-as-default-execution-space",  # for lambdas that take values of any type
        *(f"-D{key}={value}" for key, value in constants),
    ]
    _, program = nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), len(headers), *_texts(headers))
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        raise RuntimeError(f"{name}.cu does not compile with {' '.join(options)}:\n{log}")
    assembly = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    nvrtc.nvrtcDestroyProgram(program)
    return assembly


def _texts(headers: list[Any]) -> tuple[list[bytes], list[bytes]]:
    return [file.read_bytes() for file in headers], [file.name.encode() for file in headers]


def _text(size_of: Any, write: Any, program: Any) -> str:
    _, size = size_of(program)
    text = b" " * size
    write(program, text)
    return text.decode().rstrip("\0")


def launch(
    name: str,
    constants: Mapping[str, int],
    results: Any,
    *operands: Shaped[Array, "..."],
    blocks: int,
    threads: int,
    shared_nbytes: int = 0,
    cluster: int = 1,
    overwrites: int | None = None,
) -> Any:
    """Runs the function `name` of `kernels/<name>.cu`.

    XLA launches it like a kernel of its own (custom call `__gpu$xla.gpu.ptx`): in order, without the host, and inside
    loops and graphs.

    Args:
      name: of the kernel.
      constants: what the source leaves open.
      results: `jax.ShapeDtypeStruct`s; the kernel's last arguments.
      operands: its first arguments.
      blocks: of threads.
      threads: in each block.
      shared_nbytes: memory shared by the threads of a block, beside what the source declares.
      cluster: blocks of one, as the source makes them; more than one where `has_clusters` allows.
      overwrites: the operand whose memory the one result takes, with what is in it.
    """
    aliases = None if overwrites is None else {overwrites: 0}
    call = jax.ffi.ffi_call("__gpu$xla.gpu.ptx", results, vmap_method="sequential", input_output_aliases=aliases)
    sizes = {"grid_x": blocks, "grid_y": 1, "grid_z": 1, "block_x": threads, "block_y": 1, "block_z": 1}
    numbers = {key: np.int32(value) for key, value in {**sizes, "shared_mem_bytes": shared_nbytes}.items()}
    assembly = assemble(name, tuple(sorted(constants.items())), OF_CLUSTERS if cluster > 1 else ARCHITECTURE)
    return call(*operands, name=name, kernel_type="ptx", kernel_data=assembly, **numbers)
