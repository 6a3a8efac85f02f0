"""The kernels of k-means as far as they go without a GPU; `tests/gpu` runs them."""

import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvq.cluster.kmeans import kmeans
from jaxvq.cluster.palettes import fit_palettes
from jaxvq.ops import clustering, cuda
from jaxvq.ops.nearest import nearest

POINTS, CODEBOOK = jax.ShapeDtypeStruct((500, 8), "float32"), jax.ShapeDtypeStruct((32, 8), "float32")
PROGRAMS = {
    "nearest": (nearest, (POINTS, CODEBOOK)),
    "kmeans": (lambda x, c: kmeans(x, c, iterations=3), (POINTS, CODEBOOK)),
    "palettes": (lambda x: fit_palettes(x, 4), (jax.ShapeDtypeStruct((5, 300), "float32"),)),
}


def lowered(name, platform):
    """The program for a platform that is not here."""
    jax.clear_caches()  # whether there is a compiler is asked while a program is traced
    program, arguments = PROGRAMS[name]
    check = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.ptx")]
    exported = jax.export.export(jax.jit(program), platforms=[platform], disabled_checks=check)(*arguments)
    return exported.mlir_module()


@pytest.fixture
def fake_compiler(monkeypatch):
    monkeypatch.setattr(cuda, "compiler", lambda: "a compiler")
    monkeypatch.setattr(cuda, "assemble", lambda name, constants: f"the assembly of {name}")
    yield
    jax.clear_caches()


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_without_kernels_are_the_same_for_every_accelerator(name, platform):
    assert "__gpu$xla.gpu.ptx" not in lowered(name, platform)


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_are_for_nvidia_alone(name, fake_compiler):
    on_gpu = lowered(name, "cuda")
    for kernel in {"nearest": ["nearest"], "kmeans": ["nearest", "sums"], "palettes": ["palette"]}[name]:
        assert f"the assembly of {kernel}" in on_gpu
    assert "__gpu$xla.gpu.ptx" not in lowered(name, "tpu")


def test_what_no_kernel_is_for_takes_the_plain_program(fake_compiler):
    assert not clustering.supports_nearest(300, exact=False)
    assert clustering.supports_nearest(128, exact=False)
    assert not clustering.supports_nearest(128, exact=True)
    assert not clustering.supports_palettes(5000)


def test_without_the_compiler_nothing_is_supported():
    assert not clustering.supports_nearest(8, exact=True) or cuda.compiler() is not None


WHOLE = np.array([[2**40 + 7, -5, 2**32 - 1, -(2**50)], [2**41 - 9, 3, 1, -(2**33) - 1]], np.int64)


def joined(low, high):
    return np.stack([np.asarray(low), np.asarray(high)], axis=-1).astype(np.uint32).reshape(-1).view(np.int64)


def test_whole_numbers_of_64_bits_are_added_with_their_carries():
    halves = jnp.asarray(WHOLE.view(np.uint32).reshape(2, 4, 2))
    np.testing.assert_array_equal(joined(*clustering.sum_whole(halves[..., 0], halves[..., 1])), WHOLE.sum(axis=0))


def test_whole_numbers_of_several_devices_are_added_too():
    halves = jnp.asarray(WHOLE.view(np.uint32).reshape(2, 1, 4, 2))
    add = jax.vmap(lambda part: clustering.sum_whole(part[..., 0], part[..., 1], "devices"), axis_name="devices")
    low, high = add(halves)
    np.testing.assert_array_equal(joined(low[0], high[0]), WHOLE.sum(axis=0))


def test_scales_are_powers_of_two_that_leave_room_for_the_sums():
    values = jnp.array([[1.0, -3.0, 0.0, 1e-30], [0.5, 2.0, 0.0, 0.0]])
    scales = np.asarray(clustering.sum_scales(values), np.float64)
    assert (np.log2(scales) % 1 == 0).all()
    assert (2 * np.abs(np.asarray(values, np.float64)).max(axis=0) * scales <= 2.0**62).all()
    assert scales[1] * 3.0 * 2 > 2.0**60


def test_a_kernel_that_does_not_compile_shows_the_log(monkeypatch):
    success, failure = 0, 6

    def write_log(program, log):
        assert len(log) == 12
        return (success,)

    broken = types.SimpleNamespace(
        nvrtcResult=types.SimpleNamespace(NVRTC_SUCCESS=success),
        nvrtcCreateProgram=lambda *_: (success, "program"),
        nvrtcCompileProgram=lambda *_: (failure,),
        nvrtcGetProgramLogSize=lambda _: (success, 12),
        nvrtcGetProgramLog=write_log,
    )
    monkeypatch.setattr(cuda, "compiler", lambda: broken)
    with pytest.raises(RuntimeError, match=r"sums\.cu does not compile with .*-DWIDTH=-77"):
        cuda.assemble("sums", (("WIDTH", -77),))
