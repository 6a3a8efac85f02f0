"""When `matmul` takes the kernel, and that it goes with everything JAX does to a function.

A stand-in multiplies here, which like the kernel has no derivative and is batched one by one. It is taken as on a GPU.
"""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DECODERS, normal, random_array
from flax import nnx
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.sharding import AxisType, NamedSharding

import jaxvq
import jaxvq.linen
import jaxvq.nnx
import jaxvq.ops.matmul as door
from jaxvq.array import Codebook, QuantizedArray
from jaxvq.bits import pack
from jaxvq.layout import Layout
from jaxvq.ops import cuda
from jaxvq.ops.matmul import matmul, supports

ARRAYS = {
    name: dataclasses.replace(array, codes=pack(array.unpack(), array.codes.bits, axis=0))
    for name, array in DECODERS.items()
}
every_decoder = pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
palette = ARRAYS["palette per channel"]
by_xla = functools.partial(matmul, backend="xla")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass
class StandIn:
    """A kernel for at most `most_rows` rows of half precision; notes what is traced, as (rows, outputs)."""

    most_rows: int = 1000
    calls: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def reason(self, rows, inputs, dtype, w):
        assert inputs == w.layout.matrix_shape[0]
        if dtype.itemsize > 2:
            return f"`x` is {dtype}"
        return None if rows <= self.most_rows else f"`x` has {rows} rows"

    def product(self, x, w):
        @jax.custom_jvp
        @sequential_vmap
        def product(x, w):
            self.calls.append((x.shape[0], w.layout.grid[1]))
            assert w.codes.words.shape[1] == w.layout.grid[1]
            weight = w.dequantize().astype(x.dtype).astype(jnp.float32)
            weight = weight.T if w.layout.out_axis == 0 else weight
            return (x.astype(jnp.float32) @ weight).astype(x.dtype)

        product.defjvp(lambda *_: pytest.fail("the kernel has no derivative"))
        constant = np.zeros(x.shape[1], x.dtype)
        return product(x + constant, w)


def forget():
    """What was traced knows the kernel of another test."""
    door._fused.clear_cache()
    door._of_slice.clear_cache()


@pytest.fixture
def stand_in(monkeypatch):
    known = StandIn()
    monkeypatch.setattr(door.fused, "reason", known.reason, raising=False)
    monkeypatch.setattr(door.fused, "product", known.product)
    forget()
    yield known
    forget()


@pytest.fixture
def kernel(stand_in, monkeypatch):
    choose = lax.platform_dependent

    def as_on_a_gpu(*args, default=None, **branches):
        return choose(*args, default=default, **({"cpu": branches["cuda"]} if "cuda" in branches else {}), **branches)

    monkeypatch.setattr(lax, "platform_dependent", as_on_a_gpu)
    monkeypatch.setattr(cuda, "compiler", lambda: None)  # only the stand-in runs here, not the kernels of k-means
    monkeypatch.setattr(door, "_reason_of_place", lambda x: None)
    return stand_in


@pytest.fixture
def custom_call(stand_in, monkeypatch):
    """A kernel that, like the real one, is nothing but a custom call; its programs cannot run here."""

    def product(x, w):
        result = jax.ShapeDtypeStruct((x.shape[0], w.layout.grid[1]), x.dtype)
        return jax.ffi.ffi_call("the_kernel", result, vmap_method="sequential")(x, *jax.tree.leaves(w))

    monkeypatch.setattr(door.fused, "product", product)


def fresh(**options):
    """`matmul` as a function of its own: JAX remembers what it traced by function."""
    return functools.partial(matmul, **options)


def halves(*shape):
    return normal(*shape).astype(jnp.bfloat16)


def transposed(array):
    layout = dataclasses.replace(array.layout, shape=array.layout.shape[::-1], out_axis=0, in_axis=1)
    return dataclasses.replace(array, layout=layout)


def assert_same(ours, reference, tolerance=1e-2):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=0))


@every_decoder
@pytest.mark.parametrize("transpose", [False, True])
def test_the_kernel_multiplies(array, transpose, kernel):
    array, x = transposed(array) if transpose else array, halves(5, 24)
    assert supports(x, array, transpose=transpose)
    product = matmul(x, array, transpose=transpose, backend="cuda")
    assert kernel.calls == [(5, 6)]
    assert_same(product, by_xla(x, array, transpose=transpose))


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3)])
def test_leading_axes_are_rows(shape, kernel):
    x = halves(*shape, 24)
    product = jax.jit(fresh())(x, palette)
    assert set(kernel.calls) == {(int(np.prod(shape)), 6)}
    assert_same(product, by_xla(x, palette))


def loss(x, trainable, frozen, multiply=matmul):
    return jnp.sum(multiply(x, jaxvq.combine(trainable, frozen)).astype(jnp.float32) ** 2)


@every_decoder
def test_gradients_are_those_of_xla(array, kernel):
    x, (trainable, frozen) = halves(5, 24), jaxvq.partition(array)
    ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, trainable, frozen)
    assert set(kernel.calls) == {(5, 6)}
    assert_same(
        ours, jax.value_and_grad(functools.partial(loss, multiply=by_xla), argnums=(0, 1))(x, trainable, frozen)
    )
    # Eagerly codes have gradients of their own kind.
    codes = jax.grad(lambda w: loss(x, w, w), allow_int=True)(array).codes.words
    assert codes.dtype == jax.dtypes.float0


def test_nothing_of_the_size_of_the_weight_waits_for_the_backward_pass(kernel):
    _, pull = jax.vjp(functools.partial(matmul, halves(5, 24)), palette)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) < palette.size
    assert set(kernel.calls) == {(5, 6)}


def test_vmap_over_activations_is_one_product(kernel):
    x = halves(4, 3, 24)
    program = jax.make_jaxpr(jax.vmap(matmul, in_axes=(0, None)))(x, palette)
    assert kernel.calls[-1] == (12, 6)
    assert not {"scan", "while"} & {word.strip("[") for word in str(program).split()}
    assert_same(jax.jit(jax.vmap(matmul, in_axes=(0, None)))(x, palette), by_xla(x, palette))
    nested = jax.vmap(jax.vmap(matmul, in_axes=(0, None)), in_axes=(1, None), out_axes=1)
    x = halves(5, 3, 24)
    assert_same(nested(x, palette), by_xla(x, palette))
    assert kernel.calls[-1] == (15, 6)


def test_vmap_over_weights(kernel):
    x, (trainable, frozen) = halves(3, 24), jaxvq.partition(palette)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), trainable)
    expected = jnp.stack([by_xla(x, palette), 2 * by_xla(x, palette)])

    def ours(x, trainable, frozen):
        return matmul(x, jaxvq.combine(trainable, frozen))

    assert_same(jax.vmap(ours, in_axes=(None, 0, None))(x, several, frozen), expected)
    assert set(kernel.calls) == {(3, 6)}
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), frozen)
    each = jnp.stack([x, x])
    assert_same(jax.vmap(ours)(each, several, twice), expected)


def test_vmap_asks_again_for_all_rows(kernel):
    kernel.most_rows = 4
    x = halves(4, 3, 24)
    assert_same(jax.vmap(matmul, in_axes=(0, None))(x, palette), by_xla(x, palette))
    assert (12, 6) not in kernel.calls
    with pytest.raises(NotImplementedError, match=r"no kernel for `x` bfloat16\[12, 24\].*: `x` has 12 rows"):
        jax.vmap(fresh(backend="cuda"), in_axes=(0, None))(x, palette)


@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_gradients_of_examples(around, kernel):
    x, (trainable, frozen) = halves(4, 3, 24), jaxvq.partition(palette)

    def each(multiply):
        one = jax.grad(functools.partial(loss, multiply=around(multiply)), argnums=(0, 1))
        return jax.vmap(one, in_axes=(0, None, None))(x, trainable, frozen)

    assert_same(each(fresh()), each(by_xla))
    assert kernel.calls[-1] == (12, 6)


def test_scan_over_layers(kernel):
    square = random_array(Codebook(normal(1, 8, 1, 4, 1)), bits=2, shape=(8, 8), entries=4)
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[:, ::-1]]), square)

    def through(x, layers, multiply):
        step = jax.checkpoint(lambda x, layer: (multiply(x, layer), None))
        return jnp.sum(lax.scan(step, x, layers)[0].astype(jnp.float32) ** 2)

    x = halves(3, 8)
    ours, reference = (jax.jit(jax.value_and_grad(through), static_argnums=2)(x, layers, f) for f in (matmul, by_xla))
    assert set(kernel.calls) == {(3, 8)}
    assert_same(ours, reference)


def along_outputs():
    layout = Layout.of((24, 6), "float32", dim=2, along_out=True)
    codes = jnp.zeros((*layout.grid, 1), jnp.int32)
    return QuantizedArray(pack(codes, 2), Codebook(normal(1, 1, 1, 4, 2)), layout)


def without_outputs():
    layout = Layout.of((24, 6), "float32", out_axis=None)
    return QuantizedArray(pack(jnp.zeros((*layout.grid, 1), jnp.int32), 2), Codebook(normal(1, 1, 1, 4, 1)), layout)


REASONS = {
    "float": (halves(5, 24), jnp.ones((24, 6)), False, "`w` is not quantized"),
    "tied": (halves(5, 6), palette, True, r"with out_axis=1, and transpose=True needs 0; .*Rule\(..., out_axis=0\)"),
    "rows": (halves(5, 6), transposed(palette), False, "with out_axis=0, and transpose=False needs 1"),
    "whole": (halves(5, 24), without_outputs(), False, "with out_axis=None"),
    "vectors": (halves(5, 24), along_outputs(), False, "vectors of `w` lie along its outputs"),
    "codes": (
        halves(5, 24),
        dataclasses.replace(palette, codes=pack(palette.unpack(), 2, axis=1)),
        False,
        "codes of `w` are packed along its outputs",
    ),
    "dtype": (normal(5, 24), palette, False, "`x` is float32"),
}


@pytest.mark.parametrize(("x", "w", "transpose", "reason"), REASONS.values(), ids=REASONS.keys())
def test_reasons(x, w, transpose, reason, kernel):
    support = supports(x, w, transpose=transpose)
    assert not support
    with pytest.raises(NotImplementedError, match=f"`backend`='cuda' has no kernel for `x` .*{reason}.*XLA multiplies"):
        matmul(x, w, transpose=transpose, backend="cuda")
    assert_same(matmul(x, w, transpose=transpose), by_xla(x, w, transpose=transpose), 0)
    assert not kernel.calls


def test_where_there_is_no_gpu(stand_in):
    x = halves(5, 24)
    for argument in (x, jax.ShapeDtypeStruct(x.shape, x.dtype)):
        assert supports(argument, palette).reason == "the kernels are for NVIDIA GPUs, and `x` is on a cpu"
    insisting = fresh(backend="cuda")
    for multiply in (insisting, jax.jit(insisting)):
        with pytest.raises(NotImplementedError, match="and `x` is on a cpu; without `backend`, XLA"):
            multiply(x, palette)
    np.testing.assert_array_equal(jax.jit(fresh())(x, palette), jax.jit(by_xla)(x, palette))


def test_wrong_calls():
    with pytest.raises(ValueError, match=r"`backend` must be None, 'xla' or 'cuda', got 'gpu'; None takes"):
        matmul(halves(5, 24), palette, backend="gpu")
    with pytest.raises(ValueError, match=r"`w` must be \[b, a\] for `x` of shape .* = \(5, 24\), got \(24, 6\)"):
        supports(halves(5, 24), palette, transpose=True)


def test_xla_when_told(kernel):
    assert_same(matmul(halves(5, 24), palette, backend="xla"), halves(5, 24) @ palette.dequantize().astype("bfloat16"))
    assert not kernel.calls


@pytest.mark.parametrize(("platform", "count"), [("cuda", 1), ("tpu", 0), ("cpu", 0)])
def test_programs_for_each_platform(platform, count, custom_call):
    vmapped = jax.vmap(matmul, in_axes=(0, None))
    program = jax.jit(lambda x, w: jax.value_and_grad(lambda x: vmapped(x, w).astype(jnp.float32).sum())(x))
    text = program.trace(halves(2, 3, 24), palette).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@the_kernel") == count


def test_one_program_for_all_platforms(custom_call):
    check = [jax.export.DisabledSafetyCheck.custom_call("the_kernel")]
    platforms = ("cuda", "tpu", "cpu")
    x = halves(5, 24)
    exported = jax.export.export(jax.jit(fresh()), platforms=platforms, disabled_checks=check)(x, palette)
    assert exported.mlir_module().count("@the_kernel") == 1
    assert_same(exported.call(x, palette), by_xla(x, palette))


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("model",), axis_types=(kind,))


def spread(array, mesh):
    """A weight with its output features on several devices."""

    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, jax.P(None, "model" if leaf.shape[1] > 1 else None)))

    return jax.tree.map(place, array)


def compiled(function, *args):
    program = jax.jit(function).lower(*args).compile()
    return program(*args), {name for name in COLLECTIVES if name in program.as_text()}


@every_decoder
@pytest.mark.parametrize("transpose", [False, True])
def test_each_device_multiplies_with_its_outputs(array, transpose, kernel):
    mesh, x = mesh_of(), halves(5, 24)
    array = transposed(array) if transpose else array
    product, collectives = compiled(fresh(transpose=transpose), x, spread(array, mesh))
    assert kernel.calls[-1] == (5, 3)
    assert not collectives
    assert product.sharding.spec == jax.P(None, "model")
    assert_same(product, by_xla(x, array, transpose=transpose))


def test_each_device_multiplies_its_rows(kernel):
    mesh = mesh_of()
    x = jax.device_put(halves(4, 24), NamedSharding(mesh, jax.P("model")))
    product, collectives = compiled(fresh(), x, palette)
    assert kernel.calls[-1] == (2, 6)
    assert not collectives
    assert product.sharding.spec == jax.P("model")
    assert_same(product, by_xla(halves(4, 24), palette))


def test_sharded_weights_under_transformations(kernel):
    mesh, x = mesh_of(), halves(4, 3, 24)
    w = spread(palette, mesh)
    product, collectives = compiled(jax.vmap(matmul, in_axes=(0, None)), x, w)
    assert kernel.calls[-1] == (12, 3)
    assert not collectives
    assert_same(product, by_xla(x, palette))
    product, collectives = compiled(lambda x, w: lax.map(lambda x: matmul(x, w), x), x, w)
    assert kernel.calls[-1] == (3, 3)
    assert not collectives
    assert_same(product, by_xla(x, palette))
    trainable, frozen = jaxvq.partition(w)
    gradient, _ = compiled(jax.grad(loss, argnums=1), x, trainable, frozen)
    assert_same(gradient, jax.grad(functools.partial(loss, multiply=by_xla), argnums=1)(x, *jaxvq.partition(palette)))


@pytest.mark.parametrize("blocks", [1, 3])
def test_what_cannot_be_cut_evenly_is_gathered(blocks, kernel):
    array = random_array(Codebook(normal(1, blocks, 1, 4, 1)), bits=2, entries=4)
    mesh, x = mesh_of(), jax.device_put(halves(5, 24), NamedSharding(mesh_of(), jax.P(None, "model")))
    words = jax.device_put(array.codes.words, NamedSharding(mesh, jax.P(None, "model")))
    array = dataclasses.replace(array, codes=dataclasses.replace(array.codes, words=words))
    product, collectives = compiled(fresh(), x, array)
    assert kernel.calls[-1] == (5, 3 if blocks == 1 else 6)
    assert "all-gather" in collectives
    assert_same(product, by_xla(halves(5, 24), array))


def test_a_slice_without_a_kernel(kernel, monkeypatch):
    monkeypatch.setattr(door.fused, "reason", lambda rows, inputs, dtype, w: "odd" if w.layout.grid[1] % 2 else None)
    product, collectives = compiled(fresh(), halves(5, 24), spread(palette, mesh_of()))
    assert (5, 3) not in kernel.calls
    assert not collectives
    assert_same(product, by_xla(halves(5, 24), palette))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inside_shard_map(kind, kernel):
    mesh = mesh_of(kind)
    x = jax.device_put(halves(4, 24), NamedSharding(mesh, jax.P("model")))
    rows = jax.shard_map(fresh(), mesh=mesh, in_specs=(jax.P("model"), jax.P()), out_specs=jax.P("model"))
    expected = by_xla(halves(4, 24), palette)
    assert_same(jax.jit(rows)(x, palette), expected)
    assert set(kernel.calls) == {(2, 6)}

    def slices(x, w):
        return matmul(x, dataclasses.replace(w, layout=dataclasses.replace(w.layout, shape=(24, 3))))

    outs = jax.P(None, "model")
    outputs = jax.shard_map(slices, mesh=mesh, in_specs=(jax.P(), outs), out_specs=outs)
    assert_same(jax.jit(outputs)(halves(4, 24), spread(palette, mesh)), expected)
    assert kernel.calls[-1] == (4, 3)


def test_gradients_inside_shard_map(kernel):
    rows = jax.shard_map(fresh(), mesh=mesh_of(), in_specs=(jax.P("model"), jax.P()), out_specs=jax.P("model"))
    x, (trainable, frozen) = halves(4, 24), jaxvq.partition(palette)
    gradient = jax.grad(functools.partial(loss, multiply=rows), argnums=(0, 1))(x, trainable, frozen)
    assert set(kernel.calls) == {(2, 6)}
    reference = jax.grad(functools.partial(loss, multiply=by_xla), argnums=(0, 1))(x, trainable, frozen)
    assert_same(gradient, reference, 2e-2)


def test_inside_shard_map_over_one_of_two_axes(kernel):
    mesh, x = jax.make_mesh((2, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2), halves(4, 24)
    specs = {"in_specs": (jax.P("data"), jax.P()), "out_specs": jax.P("data"), "axis_names": {"data"}}
    assert_same(jax.jit(jax.shard_map(fresh(), mesh=mesh, **specs))(x, palette), by_xla(x, palette))
    assert kernel.calls[-1] == (2, 6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_custom_call_inside_shard_map(check_vma, custom_call):
    specs = {"in_specs": (jax.P("model"), jax.P()), "out_specs": jax.P("model"), "check_vma": check_vma}
    mapped = jax.jit(jax.shard_map(fresh(), mesh=mesh_of(), **specs))
    text = mapped.trace(halves(4, 24), palette).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@the_kernel") == 1


def test_explicit_axes(kernel):
    mesh = mesh_of(AxisType.Explicit)
    x = jax.device_put(halves(4, 24), NamedSharding(mesh, jax.P("model")))
    described = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for argument in (x, described):
        assert supports(argument, palette).reason == "a mesh axis is Explicit; use Auto axes or jax.shard_map"
    product = jax.jit(fresh())(x, palette)
    assert not kernel.calls
    assert product.sharding.spec == jax.P("model", None)
    assert_same(product, by_xla(halves(4, 24), palette))


def test_layers_in_half_precision(kernel):
    method, ids = jaxvq.KMeans(bits=2), jnp.array([1, 2])
    kinds = {"method": method, "dtype": jnp.bfloat16}
    inputs = jnp.ones((5, 24))
    dense = jaxvq.linen.Dense(6, **kinds)
    dense.apply(dense.init(jax.random.key(0), inputs), inputs)
    jaxvq.nnx.Linear(24, 6, rngs=nnx.Rngs(0), **kinds)(inputs)
    jaxvq.nnx.Linear(24, 6, rngs=nnx.Rngs(0), method=method, param_dtype=jnp.bfloat16)(halves(5, 24))
    assert set(kernel.calls) == {(5, 6)}
    kernel.calls.clear()
    embed = jaxvq.linen.Embed(10, 24, **kinds)
    variables = embed.init(jax.random.key(0), ids)
    embed.apply(variables, inputs, method="attend")
    jaxvq.nnx.Embed(10, 24, rngs=nnx.Rngs(0), **kinds).attend(inputs)
    assert set(kernel.calls) == {(5, 10)}
