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
from jaxvq.ops.nearest import nearest, vq

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
    monkeypatch.setattr(cuda, "assemble", lambda name, *_: f"the assembly of {name}")
    yield
    jax.clear_caches()


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_without_the_compiler_have_no_kernels(name, platform, monkeypatch):
    monkeypatch.setattr(cuda, "compiler", lambda: None)
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
    assert not clustering.supports_palettes(5000, 4096)


def test_without_the_compiler_nothing_is_supported(monkeypatch):
    monkeypatch.setattr(cuda, "compiler", lambda: None)
    assert not clustering.supports_nearest(8, exact=True)
    assert not clustering.supports_palettes(16, 256)


@pytest.mark.parametrize(
    ("capability", "nearest_runs", "palette_runs", "clusters"),
    [
        ("7.5", False, (False, False), False),
        ("8.6", True, (True, False), False),
        ("9.0", True, (True, True), True),
        ("12.0", True, (True, False), True),
        ("gfx942", False, (False, False), False),
    ],
)
def test_what_a_chip_can_do(capability, nearest_runs, palette_runs, clusters, fake_compiler, monkeypatch):
    chip = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [chip])
    monkeypatch.setattr(cuda, "shared_nbytes", cuda.shared_nbytes.__wrapped__)
    assert clustering.supports_nearest(8, exact=True) == nearest_runs
    assert cuda.has_clusters() == clusters
    assert (clustering.supports_palettes(16, 256), clustering.supports_palettes(256, 4096)) == palette_runs


def test_codes_have_no_gradient_with_kernels_either(fake_compiler):
    jax.clear_caches()
    text = str(jax.make_jaxpr(jax.grad(lambda x: vq(x, jnp.eye(8))[1].sum()))(jnp.ones((5, 8))))
    assert "the assembly of nearest" in text


def test_a_point_far_outside_does_not_decide_the_scale():
    points, codebook = jnp.array([[1.0, -2.0], [jnp.inf, 1e20]]), jnp.array([[0.5, -1.5]])
    assert clustering.size_of(points, codebook) == 64 * 1.5
    assert clustering.size_of(points[:1], codebook) == 2


WHOLE = np.array([[2**40 + 7, -5, 2**32 - 1, -(2**50)], [2**41 - 9, 3, 1, -(2**33) - 1]], np.int64)


def joined(low, high):
    return np.stack([np.asarray(low), np.asarray(high)], axis=-1).astype(np.uint32).reshape(-1).view(np.int64)


@pytest.mark.parametrize("x64", [False, True])
def test_whole_numbers_of_64_bits_are_added_with_their_carries(x64):
    with jax.enable_x64(x64):
        halves = jnp.asarray(WHOLE.view(np.uint32).reshape(2, 4, 2))
        low, high = clustering.sum_whole(halves[..., 0], halves[..., 1])
    assert low.dtype == high.dtype == jnp.uint32
    np.testing.assert_array_equal(joined(low, high), WHOLE.sum(axis=0))


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
