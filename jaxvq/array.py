"""A quantized weight: codes + decoder + layout."""

import abc
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Integer, Shaped

from jaxvq._pytree import pytree_dataclass, static
from jaxvq.bits import PackedCodes, unpack
from jaxvq.layout import Layout
from jaxvq.ops.lookup import lookup


class AbstractDecoder(abc.ABC):
    """What the codes of a weight stand for. Its floating-point leaves train; the codes never do."""

    @abc.abstractmethod
    def decode(self, codes: Integer[Array, "g out m"], bits: int) -> Float[Array, "g out d"]:
        """The vectors `[g, out, d]` that codes `[g, out, m]` of `bits` bits stand for, in float32."""

    @abc.abstractmethod
    def entries(self, bits: int) -> int:
        """How many codes have a meaning: `0 .. entries - 1`."""

    @abc.abstractmethod
    def check(self, grid: tuple[int, int], dim: int, stages: int) -> None:
        """Raises ValueError unless the decoder's shapes fit vectors of `dim` on `grid`, `stages` codes each."""


@pytree_dataclass
class Affine(AbstractDecoder):
    """Evenly spaced levels: `(code - zero_point) * scale`.

    Attributes:
      scale: the distance of two neighbouring levels, `[#g, #out, 1]`; each of the first two axes is 1 or divides
        the grid's.
      zero_point: the (fractional) code that stands for zero; None centres the codes on zero, with
        `2**(bits - 1) - 1` positive levels, or on the middle of the two values at one bit.
    """

    scale: Float[Array, "*stack g_blocks out_blocks 1"]
    zero_point: Float[Array, "*stack g_zeros out_zeros 1"] | None = None

    def decode(self, codes: Integer[Array, "g out m"], bits: int) -> Float[Array, "g out d"]:
        grid = (codes.shape[0], codes.shape[1])
        # As matrices: the gradient sums, and on a CPU that takes ten times as long with a last axis of 1.
        zero = symmetric_zero(bits) if self.zero_point is None else spread(self.zero_point[..., 0], grid)
        values = (codes[..., 0].astype(jnp.float32) - zero) * spread(self.scale[..., 0], grid)
        return values[..., None]

    def entries(self, bits: int) -> int:
        return 2**bits if self.zero_point is not None or bits == 1 else 2**bits - 1

    def check(self, grid: tuple[int, int], dim: int, stages: int) -> None:
        check_blocks("scale", self.scale.shape, grid)
        if self.zero_point is not None:
            check_blocks("zero_point", self.zero_point.shape, grid)
        if (dim, stages) != (1, 1):
            raise ValueError(f"`Affine` decodes single values, got dim={dim} and {stages} stages; use `Codebook`")


@pytree_dataclass
class Codebook(AbstractDecoder):
    """Tables of vectors: `sum over m of scale[m] * vectors[m, code[m]]`.

    Attributes:
      vectors: `[#g, #out, m, k, d]`; each of the first two axes is 1 or divides the grid's: one table for the
        tensor (1, 1), one per subspace (g, 1), per output channel (1, out), or per block of either. `m` counts the
        stages that are added up, `k` the entries. Floating point, or int8 in units of `scale`.
      scale: `[#g, #out, #m, 1, 1]`, or None for 1.
    """

    vectors: Float[Array, "*stack g_blocks out_blocks m k d"] | Int8[Array, "*stack g_blocks out_blocks m k d"]
    scale: Float[Array, "*stack g_scales out_scales m_scales 1 1"] | None = None

    def decode(self, codes: Integer[Array, "g out m"], bits: int) -> Float[Array, "g out d"]:
        del bits
        groups, outs, stages = codes.shape
        total = jnp.zeros((groups, outs, self.vectors.shape[4]), jnp.float32)
        # Stage by stage: all stages' vectors at once would take m times the weight's memory.
        for m in range(stages):
            vectors = lookup(self.vectors[:, :, m].astype(jnp.float32), codes[..., m])
            if self.scale is not None:
                scale = self.scale[:, :, min(m, self.scale.shape[2] - 1), :, 0]
                vectors = vectors * spread(scale.astype(jnp.float32), (groups, outs))
            total = total + vectors
        return total

    def entries(self, bits: int) -> int:
        del bits
        return self.vectors.shape[-2]

    def check(self, grid: tuple[int, int], dim: int, stages: int) -> None:
        shape = self.vectors.shape
        check_blocks("vectors", shape, grid)
        if (shape[2], shape[4]) != (stages, dim):
            raise ValueError(
                f"`vectors` must be [#g, #out, m, k, d] with m={stages} and d={dim}, got {shape}; "
                "the codebook belongs to another layout"
            )
        if self.scale is not None:
            check_blocks("scale", self.scale.shape, grid)
            if self.scale.shape[2] not in (1, stages):
                raise ValueError(f"`scale` must have 1 or {stages} stages on axis 2, got {self.scale.shape}")


@pytree_dataclass
class QuantizedArray:
    """A weight as codes + decoder + layout.

    `w[g, out, :] = decoder(codes[g, out, :])`, and the layout says which value of the weight each one is. Stacked
    layers (`flax.linen.scan`, `jax.vmap`) have their extra axes at the front of every array, and the layout is that
    of one slice, so that `jax.lax.scan` and `jax.vmap` hand out whole `QuantizedArray`s.

    Example:
      >>> import jax, jaxvq
      >>> weight = jax.random.normal(jax.random.key(0), (64, 32))
      >>> params = jaxvq.quantize_params({"w": weight}, jaxvq.KMeans(bits=4), key=jax.random.key(1))
      >>> params["w"].shape, round(params["w"].bits_per_weight, 2)
      ((64, 32), 4.25)
    """

    codes: PackedCodes
    decoder: AbstractDecoder
    layout: Layout = static()

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes that stack layers; () for one weight."""
        return tuple(self.codes.words.shape[:-3])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for."""
        return self.stack + self.layout.shape

    @property
    def ndim(self) -> int:
        """The rank of the weight that this stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Values in the weight that this stands for."""
        count = self.layout.size
        for n in self.stack:
            count *= n
        return count

    @property
    def dtype(self) -> Any:
        """The dtype of the weight that this stands for."""
        return jnp.dtype(self.layout.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of everything needed to decode: codes, codebooks, scales, and the padding in them."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """`8 * nbytes / size`: everything is counted."""
        return 8 * self.nbytes / self.size

    def dequantize(self) -> Shaped[Array, "..."]:
        """The weight, in its own shape and dtype. Differentiable in the decoder; works under jit, vmap and scan."""
        decode = _dequantize
        for _ in self.stack:
            decode = jax.vmap(decode)
        return decode(self)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Refused: numpy would else make an array of one object, without a word."""
        raise TypeError("an array of numbers is needed, got a QuantizedArray, which holds codes; call .dequantize()")

    def unpack(self) -> Integer[Array, "*stack g out m"]:
        """The codes as integers."""
        read = unpack
        for _ in self.stack:
            read = jax.vmap(read)
        return read(self.codes)

    def validate(self) -> None:
        """Checks that the three parts fit together and that no code is beyond the decoder.

        Raises:
          ValueError: naming the part that does not fit.
        """
        stack = len(self.stack)
        one = jax.eval_shape(lambda array: jax.tree.map(lambda leaf: leaf[(0,) * stack], array), self)
        groups, outs = self.layout.grid
        packed = one.codes
        read = jax.eval_shape(unpack, packed)
        if read.shape[:2] != (groups, outs):
            raise ValueError(
                f"`codes` must be [{groups}, {outs}, m] for layout {self.layout}, got {read.shape}; "
                "the codes belong to another layout"
            )
        one.decoder.check((groups, outs), self.layout.dim, read.shape[2])
        entries = self.decoder.entries(packed.bits)
        largest = int(jnp.max(self.unpack())) if entries < 2**packed.bits else 0
        if largest >= entries:
            raise ValueError(
                f"`codes` must be below the {entries} entries of the decoder, got {largest}; the codes are damaged"
            )


@jax.jit
def _dequantize(array: QuantizedArray) -> Shaped[Array, "..."]:
    codes = unpack(array.codes)
    return array.layout.from_vectors(array.decoder.decode(codes, array.codes.bits))


def is_quantized(node: Any) -> bool:
    """Whether `node` is a `QuantizedArray`; pass as `is_leaf=` to `jax.tree.map` to see quantized weights whole."""
    return isinstance(node, QuantizedArray)


def as_floats(weight: QuantizedArray | Shaped[Array, "..."], dtype: Any) -> Shaped[Array, "..."]:
    """A weight, quantized or not, as an array of `dtype`."""
    return (weight.dequantize() if isinstance(weight, QuantizedArray) else weight).astype(dtype)


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into what trains and what does not; the holes are None.

    Floating-point leaves train: float parameters, codebooks, scales. Codes and every other integer do not, nor do
    random keys, functions and texts, so `jax.grad` and an optimizer that see only the first tree cannot touch them.

    Example:
      >>> trainable, frozen = partition({"w": jnp.ones(2), "step": jnp.array(3)})
      >>> trainable
      {'step': None, 'w': Array([1., 1.], dtype=float32)}
    """
    trains = functools.partial(_keep, floating=True)
    rests = functools.partial(_keep, floating=False)
    return jax.tree.map(trains, tree), jax.tree.map(rests, tree)


def combine(trainable: Any, frozen: Any) -> Any:
    """The tree that `partition` split.

    Example:
      >>> combine({"w": 1.0, "step": None}, {"w": None, "step": 3})
      {'step': 3, 'w': 1.0}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None)


def _keep(leaf: Any, *, floating: bool) -> Any:
    numeric = hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)
    dtype = getattr(leaf, "dtype", None) or (jnp.result_type(leaf) if numeric else None)
    return leaf if (dtype is not None and jnp.issubdtype(dtype, jnp.inexact)) == floating else None


def symmetric_zero(bits: int) -> float:
    """The code that stands for zero when the levels are symmetric."""
    return 2.0 ** (bits - 1) - 1 if bits > 1 else 0.5


def spread(blocks: Shaped[Array, "g_blocks out_blocks *rest"], grid: tuple[int, int]) -> Shaped[Array, "..."]:
    """Repeats block values so that they broadcast against arrays on `grid`."""
    for axis, length in enumerate(grid):
        if blocks.shape[axis] not in (1, length):
            blocks = jnp.repeat(blocks, length // blocks.shape[axis], axis=axis)
    return blocks


def check_blocks(name: str, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    """Raises ValueError unless each of the first two axes of `shape` is 1 or divides the grid's."""
    if any(block < 1 or length % block for block, length in zip(shape[:2], grid, strict=True)):
        raise ValueError(
            f"`{name}` must have first axes that divide (g, out) = {grid}, got shape {shape}; "
            "it belongs to another layout"
        )
