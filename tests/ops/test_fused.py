"""The kernels of products as far as they go without a GPU, and the plain program by float64; `tests/gpu` runs them."""

import dataclasses
import functools
import importlib.resources
import math
import shutil
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxvq
import jaxvq.linen
import jaxvq.nnx
import jaxvq.ops.matmul as door
from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.bits import PackedCodes, word_count
from jaxvq.layout import Layout
from jaxvq.ops import cuda, fused, schedule
from jaxvq.ops.matmul import matmul, supports
from jaxvq.ops.problem import Problem
from tests.ops.matmul_by_hand import weight_by_hand
from tests.ops.matmul_cases import (
    FORMATS,
    ROWS,
    SHAPES,
    VECTORS,
    check_gradients,
    described,
    inputs,
    relative_error,
    weight,
)

H100, A100, RTX_4090 = 227 * 1024, 163 * 1024, 99 * 1024  # shared memory that a block of threads can have
LARGE = [(1000, 77), (4096, 14336), (28672, 8192), (200_000, 40)]
every_format = pytest.mark.parametrize("name", FORMATS)
by_xla = functools.partial(matmul, backend="xla")


def forget():
    """Whether there is a compiler is asked while a program is traced."""
    door._fused.clear_cache()
    door._of_slice.clear_cache()


@pytest.fixture
def fake_compiler(monkeypatch):
    monkeypatch.setattr(cuda, "compiler", lambda: "a compiler")
    monkeypatch.setattr(cuda, "assemble", lambda name, *_: f"the assembly of {name}")
    monkeypatch.setattr(cuda, "shared_nbytes", lambda: H100)
    forget()
    yield
    forget()


@pytest.fixture
def launches(monkeypatch):
    """Kernels are noted, as (name, constants, result, sizes), and not run."""
    noted = []

    def launch(name, constants, result, *operands, **sizes):
        noted.append(types.SimpleNamespace(name=name, constants=dict(constants), result=result, **sizes))
        return jnp.zeros(result.shape, result.dtype)

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "shared_nbytes", lambda: H100)
    return noted


def look_at(name, shape, look):
    """Calls `look` with the weight of a format, however large it is."""
    jax.eval_shape(look, described(name, shape))


def launched(launches, rows, w, dtype="bfloat16"):
    """The one kernel of a product; with `rows` 0 that which writes the weight out."""
    launches.clear()
    if rows == 0:
        fused.expand(w, dtype)
    else:
        # A function of its own: JAX remembers what it traced by function.
        product = jax.eval_shape(lambda x: fused.product(x, w), jax.ShapeDtypeStruct((rows, w.shape[0]), dtype))
        assert (product.shape, product.dtype) == ((rows, w.shape[1]), dtype)
    (launch,) = launches
    return launch


# Why no kernel serves.


def zeros(decoder, *, bits, shape=(512, 8), dim=1, stages=1):
    """A weight whose codes are all zero."""
    layout = Layout.of(shape, "float32", dim=dim)
    g, out = layout.grid
    words = jnp.zeros((word_count(g, bits), out, stages), jnp.uint32)
    return QuantizedArray(PackedCodes(words, bits=bits, length=g), decoder, layout)


def palettes(g=1, out=1, stages=1, entries=16, *, scales=None, dtype="float32", bits=4, **options):
    scale = None if scales is None else jnp.ones((*scales, 1, 1, 1))
    return zeros(Codebook(jnp.zeros((g, out, stages, entries, 1), dtype), scale), bits=bits, stages=stages, **options)


def vectors(g=1, out=1, *, dim=4, scales=None):
    scale = None if scales is None else jnp.ones((*scales, 1, 1, 1))
    return zeros(Codebook(jnp.zeros((g, out, 1, 32, dim)), scale), bits=5, dim=dim)


def levels(g=1, out=1, *, bits=4, zero_points=None, **options):
    zero = None if zero_points is None else jnp.zeros((*zero_points, 1))
    return zeros(Affine(jnp.ones((g, out, 1)), zero), bits=bits, **options)


PALETTES_MUST = "palettes must have one stage of at most 16 values and 4 bits"
ONE_CODEBOOK = "vectors must come from one codebook for the whole weight, got codebooks of parts of it"
OF_8_BITS = "the decoder must be float32, bfloat16, float16 or int8, got float8_e4m3fn"
SAME_GROUPS = "scales and palettes must have the same groups, got 2 and 4"
REASONS = {
    "palette in float8": (palettes(dtype="float8_e4m3fn"), OF_8_BITS),
    "scale in float8": (zeros(Affine(jnp.ones((1, 1, 1), "float8_e4m3fn")), bits=4), OF_8_BITS),
    "9 bits": (levels(bits=9), "evenly spaced levels must have at most 8 bits, got 9"),
    "17 entries": (palettes(entries=17, bits=5), f"{PALETTES_MUST}, got 1 of 17 at 5 bits"),
    "two stages": (palettes(stages=2), f"{PALETTES_MUST}, got 2 of 16 at 4 bits"),
    "d=3": (vectors(dim=3), "vectors must have 1, 2, 4 or 8 values, got 3"),
    "d=16": (vectors(dim=16), "vectors must have 1, 2, 4 or 8 values, got 16"),
    "codebooks of groups": (vectors(128), ONE_CODEBOOK),
    "codebooks of outputs": (vectors(out=8), ONE_CODEBOOK),
    "scales of groups of vectors": (vectors(scales=(4, 1)), ONE_CODEBOOK),
    "scales of outputs of vectors": (vectors(scales=(1, 8)), ONE_CODEBOOK),
    "groups of scales in those of palettes": (palettes(4, scales=(2, 8)), SAME_GROUPS),
    "groups of scales in those of zero points": (levels(2, zero_points=(4, 8)), SAME_GROUPS),
    "groups of 16": (levels(32), "groups must be multiples of 32 values at 4 bits, got 16"),
    "groups of 64": (palettes(8, bits=3, entries=8), "groups must be multiples of 128 values at 3 bits, got 64"),
}


@pytest.mark.parametrize(("w", "sentence"), REASONS.values(), ids=REASONS.keys())
def test_each_reason_against_a_format(w, sentence, fake_compiler):
    x = jax.ShapeDtypeStruct((2, 512), jnp.bfloat16)
    assert fused.reason(*x.shape, x.dtype, w) == sentence
    assert supports(x, w).reason == sentence


NEIGHBOURS = {
    "8 bits": levels(bits=8),
    "groups of 32": levels(16),
    "scales of groups, one palette": palettes(scales=(4, 8)),
    "palettes of groups, one scale": palettes(4, 8, scales=(1, 1)),
    "zero points of groups": levels(zero_points=(4, 8)),
    "groups of 128 at 3 bits": palettes(4, bits=3, entries=8),
}


@pytest.mark.parametrize("w", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_just_within_the_rules_is_served(w, dtype, fake_compiler, launches):
    assert fused.reason(2, 512, jnp.dtype(dtype), w) is None
    assert launched(launches, 2, w, dtype).constants["BFLOAT"] == (dtype == "bfloat16")


def test_activations_must_be_halves(fake_compiler):
    for dtype in ("float32", "int8"):
        sentence = f"`x` must be float16 or bfloat16, got {dtype}"
        assert fused.reason(2, 512, jnp.dtype(dtype), palettes()) == sentence
    assert supports(jnp.ones((2, 512)), palettes()).reason == "`x` must be float16 or bfloat16, got float32"


def test_no_kernel_without_the_compiler_or_on_an_old_chip(fake_compiler, monkeypatch):
    monkeypatch.setattr(cuda, "shared_nbytes", lambda: 0)
    assert (
        fused.reason(2, 512, jnp.bfloat16, palettes())
        == "the GPU is none of NVIDIA's of compute capability 8.0 or later"
    )
    monkeypatch.setattr(cuda, "compiler", lambda: None)
    missing = fused.reason(2, 512, jnp.bfloat16, palettes())
    assert missing == 'the kernels\' compiler is missing: pip install "jaxvq[cuda]"'


# What is asked of the kernels.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_format
def test_every_format_is_served_by_one_kernel(name, shape, fake_compiler, launches):
    def look(w):
        for dtype in ("bfloat16", "float16"):
            assert fused.reason(1, shape[0], jnp.dtype(dtype), w) is None
        for rows in (0, *ROWS):
            launch = launched(launches, rows, w)
            written = launch.constants["EXPAND"]
            assert launch.result.shape == (shape[::-1] if written else (rows, shape[1]))
            assert launch.constants["ROWS"] == (1 if written else rows)
            assert launch.name == "matmul" or not written
            assert launch.threads in range(32, 1025, 32)
            assert launch.blocks >= 1

    look_at(name, shape, look)


SMALL, LARGER = (1024, 96), (4096, 14336)
KERNELS = {
    ("4-bit palettes", SMALL, 1): "pairs",
    ("4-bit int8 palettes", SMALL, 2): "pairs",
    ("1-bit palettes", SMALL, 2): "pairs",
    ("4-bit palettes", SMALL, 3): "matmul",
    ("4-bit palettes of groups", SMALL, 1): "matmul",
    ("4 bits", SMALL, 1): "levels",
    ("8 bits, symmetric groups", SMALL, 2): "levels",
    ("4 bits", SMALL, 3): "matmul",
    ("4 bits", SMALL, 64): "matmul",
    ("2 x 8 bits, d=8", SMALL, 1): "matmul",
    ("2 x 8 bits, d=8", LARGER, 1): "products",
    ("2 x 8 bits, d=8", LARGER, 2): "matmul",
    ("4 x 4 bits, d=8", LARGER, 1): "products",
    ("1 x 12 bits, d=8", LARGER, 1): "products",
    ("2 x 8 bits, d=8", (2048, 128256), 1): "products",
    ("2 x 8 bits, d=8", (256, 128256), 1): "matmul",  # a quarter of a table
    ("2 x 8 bits, d=8", (1056, 14336), 1): "matmul",  # a table and a little
    ("1 x 12 bits, d=8", (4096, 4096), 1): "matmul",
    ("1 x 16 bits, d=8", LARGER, 1): "matmul",
    ("1 x 8 bits, d=2", LARGER, 1): "matmul",
}


@pytest.mark.parametrize(("name", "shape", "rows"), KERNELS)
def test_which_kernel_serves(name, shape, rows, fake_compiler, launches):
    def look(w):
        launch = launched(launches, rows, w)
        assert (launch.name, launch.constants["EXPAND"]) == (KERNELS[name, shape, rows], 0)
        assert (launch.cluster > 1) == (launch.name == "products")
        assert launched(launches, 65, w).constants["EXPAND"] == 1

    look_at(name, shape, look)


@pytest.mark.parametrize(("outputs", "outs"), [(8448, 64), (10240, 80), (14336, 112), (16384, 128), (128256, 128)])
def test_processors_have_about_the_same_outputs(outputs, outs, fake_compiler, launches):
    """Of the sizes of blocks the one with which the busiest processor has least to do."""

    def look(w):
        assert schedule.choose(Problem(16, w.shape[0], jnp.dtype("bfloat16"), w)).outs == outs
        assert launched(launches, 16, w).blocks <= min(schedule.PROCESSORS, -(-outputs // outs))

    look_at("4-bit palettes", (2048, outputs), look)


@pytest.mark.parametrize(("outputs", "columns"), [(2048, 4), (4096, 4), (8448, 2), (14336, 4), (16384, 4), (20_000, 2)])
def test_threads_have_more_outputs_of_a_row_where_no_processor_waits_for_it(outputs, columns, fake_compiler, launches):
    def look(w):
        launch = launched(launches, 1, w)
        assert (launch.name, launch.constants["COLUMNS"]) == ("pairs", columns)
        assert launched(launches, 2, w).constants["COLUMNS"] == (columns if outputs <= 4096 else 2)

    look_at("4-bit palettes", (2048, outputs), look)


RINGS = {
    ("4-bit palettes", (4096, 14336), 1): (4, 32, 16, 2, 1),
    ("4-bit palettes", (2048, 128256), 1): (2, 32, 16, 4, 0),
    ("4-bit palettes", (2048, 20_000), 1): (2, 32, 16, 4, 0),
    ("4-bit palettes", (4096, 20_000), 1): (2, 32, 16, 4, 1),
    ("4-bit palettes", (4096, 4096), 1): (4, 8, 8, 8, 0),
    ("4-bit palettes", (4104, 4096), 1): (2, 16, 16, 4, 1),
    ("3-bit palettes", (4096, 4096), 1): (4, 8, 8, 2, 0),
    ("3-bit palettes", (4096, 4096), 2): (2, 16, 16, 4, 1),
    ("3-bit palettes", (11008, 4096), 1): (2, 16, 16, 4, 1),
    ("4-bit palettes", (4096, 4096), 2): (4, 8, 8, 8, 0),
    ("2-bit palettes", (4096, 4096), 1): (2, 16, 16, 4, 0),
    ("4-bit palettes", (4096, 14336), 2): (2, 32, 16, 4, 1),
    ("4-bit palettes", (4096, 14338), 1): (4, 32, 16, 2, 1),
    ("4-bit palettes", (2048, 3072), 1): (4, 8, 8, 4, 0),
    ("4-bit palettes", (256, 3072), 1): (2, 16, 8, 2, 0),
    ("4-bit palettes", (2048, 2048), 1): (4, 4, 8, 2, 0),
    ("4-bit palettes", (32, 2048), 1): (2, 8, 8, 2, 0),
    ("3-bit palettes", (2048, 16384), 1): (4, 32, 16, 2, 0),
    ("2-bit palettes", (4096, 14336), 1): (4, 32, 16, 2, 1),
    ("1-bit palettes", (4096, 14336), 1): (2, 32, 16, 4, 1),
}


@pytest.mark.parametrize(("name", "shape", "rows"), RINGS)
def test_rings_of_shared_memory_that_codes_of_palettes_come_by(name, shape, rows, fake_compiler, launches):
    """(columns, lanes with different outputs, warps, places of the ring, whether x is read from shared memory)"""

    def look(w):
        given = launched(launches, rows, w).constants
        assert tuple(given[key] for key in ("COLUMNS", "LANES", "K_WARPS", "RING", "SPLIT")) == RINGS[name, shape, rows]

    look_at(name, shape, look)


@pytest.mark.parametrize(
    ("name", "shape", "rows", "tiles"),
    [
        ("4-bit palettes", (4096, 4096), 16, (16, 2, 1)),
        ("4-bit palettes", (4096, 4224), 3, (16, 2, 1)),
        ("4-bit palettes", (4096, 2112), 16, (16, 2, 1)),
        ("8 bits", (4096, 4096), 16, (16, 1, 1)),
        ("4-bit palettes", (4096, 4228), 16, (8, 4, 2)),
        ("4-bit palettes", (4096, 4096), 17, (8, 4, 1)),
        ("3-bit palettes", (4096, 4096), 16, (8, 1, 2)),
        ("4-bit palettes of groups", (4096, 4096), 16, (8, 4, 2)),
        ("2 x 8 bits, d=8", (4096, 4096), 1, (8, 1, 2)),
    ],
)
def test_blocks_that_have_a_processor_to_themselves_have_more_warps(name, shape, rows, tiles, fake_compiler, launches):
    """(warps that share the input side, turns on their way, blocks at once on a processor)"""

    def look(w):
        launch = launched(launches, rows, w)
        given = launch.constants
        assert launch.name == "matmul"
        assert (given["K_WARPS"], given["SPAN"], given["BLOCKS"]) == tiles

    look_at(name, shape, look)


@pytest.mark.parametrize(
    ("memory", "shape", "rows", "tiles"),
    [
        (A100, (4096, 14336), 1, (2, 4, 4)),
        (H100, (12288, 14336), 1, (2, 4, 4)),
        (RTX_4090, (4096, 14336), 1, (2, 2, 2)),
        (RTX_4090, (8192, 8192), 1, (2, 1, 2)),
        (RTX_4090, (11008, 4096), 1, (2, 1, 2)),
        (RTX_4090, (4096, 14336), 2, (2, 1, 2)),
    ],
)
def test_fewer_columns_and_smaller_rings_where_there_is_less_room(
    memory, shape, rows, tiles, fake_compiler, launches, monkeypatch
):
    """(columns, units of a step, places of the ring)"""
    monkeypatch.setattr(cuda, "shared_nbytes", lambda: memory)

    def look(w):
        launch = launched(launches, rows, w)
        given = launch.constants
        assert launch.name == "pairs"
        assert (given["COLUMNS"], given["SPAN"], given["RING"]) == tiles

    look_at("4-bit palettes", shape, look)


@pytest.mark.parametrize(("outputs", "outs"), [(2048, 16), (2112, 16), (2560, 32), (4224, 32), (5120, 64)])
def test_lanes_have_the_same_outputs_where_that_gives_work_to_more_processors(outputs, outs, fake_compiler, launches):
    def look(w):
        launch = launched(launches, 1, w)
        assert (launch.constants["LANES"] * launch.constants["COLUMNS"], launch.constants["TAKES"]) == (outs, 1)
        assert launch.blocks == -(-outputs // outs)

    look_at("4-bit palettes", (2048, outputs), look)


@every_format
def test_a_warp_writes_out_what_its_lanes_read_at_once(name, fake_compiler, launches):
    """32 values of an output, a unit that is longer, or a group. More blocks than that would find nothing to do."""

    def look(w):
        given = launched(launches, 0, w).constants
        problem = Problem(1, w.shape[0], jnp.dtype("bfloat16"), w)
        values = problem.unit[1] * problem.dim
        if problem.groups == 1:
            assert given["SPAN"] * values == max(32, values)
        in_groups = problem.groups > 1 and problem.parts[0] is not None
        shares = problem.groups if in_groups else -(-problem.turns // given["SPAN"])
        warps = given["K_BLOCKS"] * given["K_WARPS"]
        assert (given["TAKES"], shares <= warps < shares + given["K_WARPS"]) == (1, True), w.shape

    for shape in [*LARGE, (4096, 4096)]:
        look_at(name, shape, look)


def test_chips_without_clusters_have_none(fake_compiler, launches, monkeypatch):
    monkeypatch.setattr(cuda, "has_clusters", lambda: False)

    def look(w):
        launch = launched(launches, 1, w)
        assert (launch.name, launch.cluster, launch.constants["K_BLOCKS"]) == ("products", 1, 1)

    look_at("2 x 8 bits, d=8", LARGER, look)


@pytest.mark.parametrize("memory", [H100, A100, RTX_4090])
@every_format
def test_tiles_fit_the_chip_and_the_groups(name, memory, launches, monkeypatch):
    monkeypatch.setattr(cuda, "shared_nbytes", lambda: memory)

    def look(w):
        for rows in range(1, 65):
            problem = Problem(rows, w.shape[0], jnp.dtype("bfloat16"), w)
            tiles = schedule.choose(problem)
            # Few rows must not wait for the weight to be written out.
            assert tiles or rows > 16, (w.shape, rows)
            if tiles is not None:
                assert schedule.nbytes_of(problem, tiles) <= memory, (w.shape, rows)
                assert problem.groups == 1 or problem.group_turns % tiles.span == 0, (w.shape, rows)
        for rows in (0, 1, 64, 65):
            launch = launched(launches, rows, w)
            assert launch.constants["SHARED_NBYTES"] <= memory
            assert problem.groups == 1 or problem.group_turns % launch.constants["SPAN"] == 0

    for shape in LARGE:
        look_at(name, shape, look)


SIZES = [
    ((1000, 77), 0),
    ((4099, 77), 0),
    ((1000, 77), 1),
    ((1000, 77), 3),
    ((4096, 14336), 1),
    ((4096, 14336), 2),
    ((4096, 14336), 16),
]
SIZES += [((1000, 14301), 4), ((4096, 4096), 16), ((4096, 4096), 1), ((2048, 2048), 1), ((2048, 128256), 1)]
SHARED = {
    "pairs": "TABLE_BYTES + RING * STEP_BYTES + 2 * ROWS * X_ROW + 4 * (K_WARPS * ROWS + 2) * OUTS + 2 * STAGED",
    "levels": "8 * (GROUPED ? K_WARPS : 2) * OUTS + K_WARPS * ROWS * (8 * OUTS + 3 * X_STRIDE)",
    "products": "TABLE_BYTES + SPAN * PART_BYTES * WARPS + 16 * PHASES * SLOTS + 4 * TAKES * BLOCK_OUTS + 8 * WARPS",
    "matmul": "TABLE_BYTES + X_BYTES + WAITING_BYTES + (EXPAND ? 0 : 4 * K_WARPS * ROWS * SUMS_ROW)",
}


@pytest.mark.slow
@pytest.mark.skipif(cuda.compiler() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize(
    ("name", "starting"), [*((name, schedule.STARTING) for name in FORMATS), *((name, -math.inf) for name in VECTORS)]
)
def test_kernels_compile_and_use_the_memory_they_are_given(name, starting, launches, monkeypatch, tmp_path):
    """They are compiled with a line more, which compares; vectors also as if tables were ready at once."""
    monkeypatch.setattr(schedule, "STARTING", starting)
    kernels = shutil.copytree(str(importlib.resources.files("jaxvq.ops").joinpath("kernels")), tmp_path / "kernels")
    for kernel, nbytes in SHARED.items():
        with (kernels / f"{kernel}.cu").open("a") as file:
            file.write(f'\nstatic_assert(SHARED_NBYTES == {nbytes}, "shared memory");\n')
    monkeypatch.setattr(cuda.importlib.resources, "files", lambda package: tmp_path)

    def look(w, rows):
        launch = launched(launches, rows, w)
        architecture = cuda.OF_CLUSTERS if launch.cluster > 1 else cuda.ARCHITECTURE
        assembly = cuda.assemble.__wrapped__(launch.name, tuple(sorted(launch.constants.items())), architecture)
        assert f".entry {launch.name}(" in assembly
        nbytes = launch.constants["SHARED_NBYTES"]
        declared = nbytes <= 48 * 1024
        assert launch.shared_nbytes == (0 if declared else nbytes)
        assert (f"[{nbytes}];" in assembly) == (declared and nbytes > 0)

    for shape, rows in SIZES:
        look_at(name, shape, functools.partial(look, rows=rows))


# Programs for chips that are not here.


@pytest.mark.parametrize(("rows", "shape"), [(0, (256, 64)), (3, (256, 0)), (3, (0, 64))])
def test_where_there_is_nothing_to_multiply_no_kernel_is_asked(rows, shape, fake_compiler):
    w = weight("4-bit palette of the tensor", (256, 64))
    w = dataclasses.replace(
        w,
        codes=dataclasses.replace(w.codes, words=jnp.zeros((shape[0] // 8, shape[1], 1), "uint32")),
        layout=dataclasses.replace(w.layout, shape=shape),
    )
    assert fused.reason(rows, shape[0], jnp.bfloat16, w) == (
        f"there is nothing to multiply, got {rows} rows, {shape[0]} inputs and {shape[1]} outputs"
    )


def test_products_of_no_rows(fake_compiler):
    w, x = weight("4-bit palettes", (256, 64)), jnp.zeros((0, 256), jnp.bfloat16)
    assert matmul(x, w).shape == (0, 64)
    assert jax.vmap(lambda x: matmul(x, w))(x).shape == (0, 64)


def exported(program, platform, *arguments):
    forget()
    check = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.ptx")]
    return jax.export.export(jax.jit(program), platforms=[platform], disabled_checks=check)(*arguments).mlir_module()


def assert_one_kernel_on_nvidia_alone(program, *arguments):
    on_gpu = exported(program, "cuda", *arguments)
    assert on_gpu.count("__gpu$xla.gpu.ptx") == on_gpu.count("the assembly of ") == 1
    assert "__gpu$xla.gpu.ptx" not in exported(program, "tpu", *arguments)


@every_format
def test_programs_of_every_format(name, fake_compiler):
    x = jax.ShapeDtypeStruct((1, 1000), jnp.bfloat16)
    assert_one_kernel_on_nvidia_alone(lambda x, w: matmul(x, w), x, described(name, (1000, 77)))


@pytest.mark.parametrize("rows", ROWS)
def test_programs_for_every_number_of_rows(rows, fake_compiler):
    x = jax.ShapeDtypeStruct((rows, 1000), jnp.bfloat16)
    assert_one_kernel_on_nvidia_alone(lambda x, w: matmul(x, w), x, described("3-bit palettes", (1000, 77)))


def test_programs_without_the_compiler_have_no_kernel(monkeypatch):
    monkeypatch.setattr(cuda, "compiler", lambda: None)
    x = jax.ShapeDtypeStruct((1, 1000), jnp.bfloat16)
    assert "__gpu$xla.gpu.ptx" not in exported(lambda x, w: matmul(x, w), "cuda", x, described("8 bits", (1000, 77)))


@pytest.fixture
def clears_caches(fake_compiler):
    """What clusters the weights of a layer has been traced with the fake compiler too."""
    yield
    jax.clear_caches()


METHODS = [
    jaxvq.KMeans(bits=4, per="channel"),
    jaxvq.KMeans(bits=3, codebook_dtype="int8"),
    jaxvq.Residual(stages=2, bits=4, dim=8),
    jaxvq.Uniform(bits=4, per=64),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_layers_of_linen(method, clears_caches):
    layer, x = jaxvq.linen.Dense(24, method=method, dtype=jnp.bfloat16), jnp.ones((3, 128))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert_one_kernel_on_nvidia_alone(layer.apply, variables, x)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_layers_of_nnx(method, clears_caches):
    make = functools.partial(jaxvq.nnx.Linear, 128, 24, method=method, dtype=jnp.bfloat16)
    layer, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    assert_one_kernel_on_nvidia_alone(lambda state, x: nnx.merge(layer, state)(x), state, jnp.ones((3, 128)))


# The plain program, by numpy and in float64.


@every_format
def test_the_plain_program_multiplies(name):
    w, x = weight(name, (1000, 77)), inputs(3, 1000, "float32")
    got = by_xla(x, w, precision="highest")
    assert relative_error(got, np.asarray(x, np.float64) @ weight_by_hand(w)) < 1e-6


SOME = [
    "4-bit palette of the tensor",
    "4-bit palettes of groups",
    "4-bit int8 palettes of groups",
    "2 x 8 bits, d=8",
    "3 x 6 bits, d=4, int8",
    "8 bits, symmetric groups",
    "4 bits, groups",
    "1 bits",
]


@pytest.mark.parametrize("name", SOME)
def test_the_plain_program_in_half_precision(name):
    w, x = weight(name, (250, 16)), inputs(3, 250, "bfloat16")
    assert relative_error(by_xla(x, w), np.asarray(x, np.float64) @ weight_by_hand(w)) < 4e-3


@pytest.mark.parametrize("name", SOME)
def test_gradients_of_the_plain_program(name):
    product = functools.partial(by_xla, precision="highest")
    check_gradients(product, weight(name, (250, 16)), inputs(3, 250, "float32"))
