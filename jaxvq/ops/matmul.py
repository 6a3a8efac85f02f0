"""The product of activations and a quantized matrix: a kernel where there is one, XLA's program everywhere else."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from jaxvq._pytree import pytree_dataclass, static
from jaxvq.array import QuantizedArray, as_floats
from jaxvq.ops import fused
from jaxvq.ops.tables import has_tables, table_product
from jaxvq.ops.tiles import tile_count, tiled_product

Weight = QuantizedArray | Shaped[Array, "_ _"]


def matmul(
    x: Float[Array, "*batch a"],
    w: Weight,
    *,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
    backend: str | None = None,
) -> Float[Array, "*batch b"]:
    """`x @ w`, or `x @ w.T`, in the dtype of `x`.

    Differentiable in `x` and in the decoder of `w`: each codebook entry receives the sum of the gradients of the
    weights that it stands for. Where `supports` says so, an NVIDIA GPU multiplies by a kernel that reads the packed
    codes and, up to 64 rows, never writes the weight out. Its sums are float32; at one or two rows those of palettes
    are of sums of eight products in float16, and at one row of a large weight those of vectors are of sums of eight
    inner products in float16, for which vectors below 2**-30 of the largest count as zero. A program that is exported
    where there is no GPU is for chips like an H100. A `jax.vmap` over `x` alone is one product with more rows, and
    where `w` is sharded along its output features over Auto mesh axes each device multiplies with its own slice.
    Forward-mode and second derivatives need `backend="xla"`.

    Args:
      x: the activations.
      w: the weight, quantized or not, `[a, b]`.
      transpose: the weight is `[b, a]`, as that of an output layer tied to an embedding or of PyTorch's `Linear`.
      precision: of XLA's product; see `jax.lax.Precision`.
      backend: None takes the kernel where there is one, `"xla"` never, `"cuda"` always.

    Raises:
      ValueError: for a weight that is no matrix or does not fit `x`, and an unknown backend.
      NotImplementedError: for `backend="cuda"` where `supports` gives a reason against it.

    Example:
      >>> import jax, jaxvq
      >>> weight = jax.random.normal(jax.random.key(0), (64, 32))
      >>> quantized = jaxvq.quantize_params(weight, jaxvq.KMeans(bits=4), key=jax.random.key(1))
      >>> matmul(jnp.ones((8, 64)), quantized).shape
      (8, 32)
    """
    if backend not in (None, "xla", "cuda"):
        raise ValueError(f"`backend` must be None, 'xla' or 'cuda', got {backend!r}; None takes the fastest")
    _check_shapes(x, w, transpose)
    call = _Call(transpose, precision, backend == "cuda")
    if backend == "xla":
        return _by_xla(x, w, call)
    reason = _reason(x, w, transpose)
    if call.insists:
        _require(x, w, reason or _reason_of_place(x))
    if reason is not None:
        return _by_xla(x, w, call)
    assert isinstance(w, QuantizedArray)
    product = _fused(x.reshape(-1, x.shape[-1]), w, call)
    return product.reshape(*x.shape[:-1], product.shape[-1])


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether a kernel multiplies: true or false, with the reason where it is false. See `supports`."""

    reason: str | None

    def __bool__(self) -> bool:
        return self.reason is None


def supports(x: Any, w: Weight, *, transpose: bool = False) -> Support:
    """Whether `matmul(x, w, transpose=transpose)` takes a kernel on this machine, and if not, why.

    Args:
      x: the activations; only shape, dtype and place count, so a `jax.ShapeDtypeStruct` will do.
      w: the weight.
      transpose: as for `matmul`.

    Returns:
      True or False, as far as `if` is concerned, with the attribute `reason`: a sentence, or None where it is true.

    Raises:
      ValueError: for a weight that is no matrix or does not fit `x`.

    Example:
      >>> support = supports(jnp.ones((8, 64)), jnp.ones((64, 32)))
      >>> bool(support), support.reason
      (False, '`w` is not quantized')
    """
    _check_shapes(x, w, transpose)
    return Support(_reason(x, w, transpose) or _reason_of_place(x))


def _check_shapes(x: Any, w: Weight, transpose: bool) -> None:
    if len(w.shape) != 2 or len(x.shape) < 1 or x.shape[-1] != w.shape[1 if transpose else 0]:
        form = "[b, a]" if transpose else "[a, b]"
        raise ValueError(
            f"`w` must be {form} for `x` of shape [..., a] = {x.shape}, got {w.shape}; "
            "stacked layers go through jax.vmap or jax.lax.scan, other weights through w.dequantize()"
        )


def _require(x: Any, w: Weight, reason: str | None) -> None:
    """Raises NotImplementedError where there is a reason against the kernel that is insisted on."""
    if reason is not None:
        raise NotImplementedError(
            f"`backend`='cuda' has no kernel for `x` {x.dtype}{list(x.shape)} and `w` {list(w.shape)}: {reason}; "
            "without `backend`, XLA multiplies where no kernel does"
        )


def _reason(x: Any, w: Weight, transpose: bool) -> str | None:
    """Why no kernel serves, wherever the program will run; None where one does."""
    if not isinstance(w, QuantizedArray):
        return "`w` is not quantized"
    form = _reason_of_form(x, w, transpose)
    return form or fused.reason(math.prod(x.shape[:-1]), x.shape[-1], x.dtype, w)


def _reason_of_form(x: Any, w: QuantizedArray, transpose: bool) -> str | None:
    """Why the codes are not those of parts of the input side, one below the other; None where they are."""
    layout, needed = w.layout, 0 if transpose else 1
    if layout.out_axis != needed:
        return (
            f"`w` is quantized with out_axis={layout.out_axis}, and transpose={transpose} needs {needed}; "
            f"quantize it with jaxvq.Rule(..., out_axis={needed})"
        )
    if layout.along_out:
        return "the vectors of `w` lie along its outputs; quantize it with vectors along the inputs"
    if w.codes.axis != 0:
        return "the codes of `w` are packed along its outputs, as where there are few inputs"
    if any(_is_explicit(leaf) for leaf in jax.tree.leaves((x, w))):
        return "a mesh axis is Explicit; use Auto axes or jax.shard_map"
    return None


def _is_explicit(array: Any) -> bool:
    """Whether the type of an array speaks of shardings, which a kernel's result has no word for."""
    sharding = array.sharding if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array).sharding
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def _reason_of_place(x: Any) -> str | None:
    known = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    platform = next(iter(x.devices())).platform if known else jax.default_backend()
    return None if platform == "gpu" else f"the kernels are for NVIDIA GPUs, and `x` is on a {platform}"


@pytree_dataclass
class _Call:
    """What is fixed about a product before its arrays are known: a tree without leaves."""

    transpose: bool = static()
    precision: Any = static()
    insists: bool = static()


def _by_xla(x: Float[Array, "*batch a"], w: Weight, call: _Call) -> Float[Array, "*batch b"]:
    def at_once(x: Array, w: Weight) -> Array:
        axes = (x.ndim - 1,), (1 if call.transpose else 0,)
        return lax.dot_general(x, as_floats(w, x.dtype), (axes, ((), ())), precision=call.precision)

    product = None
    if isinstance(w, QuantizedArray) and _reason_of_form(x, w, call.transpose) is None:
        product = _faster_on_cpu(math.prod(x.shape[:-1]), w, call.precision)
    if product is None:
        return at_once(x, w)

    def on_cpu(x: Array, w: Any) -> Array:
        return product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)

    return lax.platform_dependent(x, w, cpu=on_cpu, default=at_once)


def _faster_on_cpu(rows: int, w: QuantizedArray, precision: lax.PrecisionLike) -> Callable[[Array, Any], Array] | None:
    """The product of `x` `[rows, a]` and `w` that a CPU finishes before it has decoded `w`; None where none does."""
    if has_tables(rows, w):
        return functools.partial(table_product, precision=precision)
    count = tile_count(rows, w)
    return None if count is None else functools.partial(tiled_product, count=count, precision=precision)


# From here on the kernel's path, one of JAX's rules a function.


@jax.custom_vjp
def _differentiable(x: Float[Array, "n a"], w: QuantizedArray, call: _Call) -> Float[Array, "n b"]:
    return _batchable(x, w, call)


def _backward(kept: Any, gradient: Float[Array, "n b"]) -> Any:
    """That of XLA's program, which decodes the weight anew."""
    x, w, call = kept
    return *jax.vjp(functools.partial(_by_xla, call=call), x, w)[1](gradient), call


_differentiable.defvjp(lambda *kept: (_batchable(*kept), kept), _backward)
_fused = jax.jit(_differentiable)  # so that calls outside of jit are compiled once


@custom_vmap
def _batchable(x: Float[Array, "n a"], w: QuantizedArray, call: _Call) -> Float[Array, "n b"]:
    # In a jax.shard_map the arrays are slices already.
    inside = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return _on_its_platform(x, w, call, _on_slice if inside else _partitioned)


@_batchable.def_vmap
def _batched(size: int, in_batched: Any, x: Array, w: QuantizedArray, call: _Call) -> tuple[Array, bool]:
    """Activations that are batched alone are more rows; where weights are, the kernel takes one after the other."""
    x_axis, w_axes, _ = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
    if jax.tree.leaves(w_axes):
        one = functools.partial(_on_its_platform, call=call, kernel=_on_slice)
        return jax.vmap(one, in_axes=(x_axis, w_axes))(x, w), True
    rows = x.shape[1]
    product = _batchable(x.reshape(size * rows, x.shape[2]), w, call)
    return product.reshape(size, rows, product.shape[1]), True


def _on_its_platform(x: Float[Array, "n a"], w: QuantizedArray, call: _Call, kernel: Any) -> Float[Array, "n b"]:
    """The kernel in programs for NVIDIA's GPUs, XLA in those for others and for a number of rows without a kernel."""
    reason = fused.reason(x.shape[0], x.shape[1], x.dtype, w)
    if call.insists:
        _require(x, w, reason)
    if reason is not None:
        return _by_xla(x, w, call)
    default = None if call.insists else functools.partial(_by_xla, call=call)
    return lax.platform_dependent(x, w, cuda=functools.partial(kernel, call=call), default=default)


def _on_slice(x: Float[Array, "n a"], w: QuantizedArray, call: _Call) -> Float[Array, "n b"]:
    """The product with the output features of `w` that its arrays hold, which may be fewer than its layout says."""
    shape = (w.codes.words.shape[1], x.shape[1]) if call.transpose else (x.shape[1], w.codes.words.shape[1])
    w = dataclasses.replace(w, layout=dataclasses.replace(w.layout, shape=shape))
    if fused.reason(x.shape[0], x.shape[1], x.dtype, w) is not None:
        return _by_xla(x, w, call)
    return _varying_as(fused.product(x, w), jax.eval_shape(functools.partial(_by_xla, call=call), x, w))


def _varying_as(product: Float[Array, "n b"], expected: Any) -> Float[Array, "n b"]:
    """Inside `jax.shard_map` a type says over which mesh axes its values differ; that of a custom call says none."""
    axes, said = (getattr(t.manual_axis_type, "varying", frozenset()) for t in (expected, jax.typeof(product)))
    return lax.pcast(product, tuple(axes - said), to="varying") if axes - said else product


def _partition(mesh: Mesh, arguments: Any, result: Any) -> Any:
    """Rows and output features stay spread as they are; along everything else each device has all of its slice."""
    x, w, call = arguments

    def if_even(axes: Any, lengths: set[int]) -> Any:
        devices = math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes or ()))
        return axes if all(length % devices == 0 for length in lengths) else None

    def place(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    rows, outs = (*result.sharding.spec, None, None)[:2]
    rows = if_even(rows, {x.shape[0]})
    # The second axis of every array of a weight counts its output features, or blocks of them, or is 1.
    outs = if_even(outs, {leaf.shape[1] for leaf in jax.tree.leaves(w)} - {1})
    w_places = jax.tree.map(lambda leaf: place(None, None if leaf.shape[1] == 1 else outs), w)
    return mesh, _on_slice, place(rows, outs), (place(rows), w_places, call)


def _sharding_rule(mesh: Mesh, operands: Any, results: Any) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The same for the pass that decides what is sharded how: lengths of one name are sharded alike."""
    outs, whole, terms = results[0].shape[1], ["a"], ["n a"]
    for i, operand in enumerate(operands[1:]):
        names = [f"w{i}_{axis}" for axis in range(len(operand.shape))]
        names[1] = "b" if operand.shape[1] == outs else names[1]
        whole += [name for name in names if name != "b"]
        terms.append(" ".join(names))
    return f"{', '.join(terms)} -> n b", {"need_replication_factors": tuple(whole)}


# XLA cannot look into a kernel: without a rule it would gather a sharded weight on every device.
_of_slice = jax.jit(_on_slice)  # the rule is for functions without constants, and jit holds those of a kernel
_partitioned = custom_partitioning(_of_slice)
_partitioned.def_partition(_partition, sharding_rule=_sharding_rule)
