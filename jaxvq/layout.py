"""The one reshape between a weight of any rank and its vectors `[g, out, d]`."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a weight is cut into vectors.

    The weight is first seen as a matrix `[in, out]`: the output axis apart, all others flattened with the
    input-channel axis first and the spatial axes after it. A 3x3 kernel at `dim=9` so has one vector per
    two-dimensional filter. The input side (or the output side, `along_out`) is then padded with zeros to whole
    vectors and whole groups, and cut.

    Attributes:
      shape: the weight's shape.
      dtype: the weight's dtype, by name.
      out_axis: the axis of output features, not negative; None puts every value on the input side.
      in_axis: the axis of input channels, not negative; None when there is none.
      dim: `d`, the values in one vector.
      pad: zeros added to the end of the side that is cut.
      along_out: cut vectors along the output side instead of the input side.

    Example:
      >>> Layout((784, 128), "float32", out_axis=1, in_axis=0, dim=8).grid
      (98, 128)
    """

    shape: tuple[int, ...]
    dtype: str
    out_axis: int | None
    in_axis: int | None
    dim: int = 1
    pad: int = 0
    along_out: bool = False

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: Any,
        *,
        out_axis: int | None = -1,
        channels_last: bool = True,
        dim: int = 1,
        group: int = 1,
        along_out: bool = False,
    ) -> "Layout":
        """The layout of a weight, with the padding that vectors of `dim` in groups of `group` values need.

        Args:
          shape: the weight's shape.
          dtype: its dtype.
          out_axis: the axis of output features (negative counts from the end).
          channels_last: where the input channels are when a rank-3 shape leaves it open (`out_axis=1`):
            with the last two axes, as in Flax, or with the first two, as in PyTorch.
          dim: values per vector.
          group: the padded side becomes a multiple of this too.
          along_out: cut along the output side.

        Raises:
          ValueError: for an axis that the shape does not have or a `dim` or `group` below 1.
        """
        rank = len(shape)
        if out_axis is not None and not -rank <= out_axis < rank:
            raise ValueError(
                f"`out_axis` must name one of the {rank} axes of shape {shape}, got {out_axis}; "
                f"use a number from {-rank} to {rank - 1}"
            )
        if dim < 1 or group < 1:
            raise ValueError(f"`dim` and `group` must be at least 1, got {dim} and {group}; use 1 for scalars")
        out_axis = None if out_axis is None else out_axis % rank
        bare = cls(tuple(shape), jnp.dtype(dtype).name, out_axis, _input_axis(rank, out_axis, channels_last))
        rows, columns = bare.matrix_shape
        cut = columns if along_out else rows
        return dataclasses.replace(bare, dim=dim, pad=-cut % math.lcm(dim, group), along_out=along_out)

    @property
    def size(self) -> int:
        """Values in the weight, without padding."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(in, out) before padding."""
        out = 1 if self.out_axis is None else self.shape[self.out_axis]
        rest = math.prod(n for axis, n in enumerate(self.shape) if axis != self.out_axis)
        return rest, out

    @property
    def grid(self) -> tuple[int, int]:
        """(g, out): how many vectors lie along the input and the output side."""
        rows, columns = self.matrix_shape
        if self.along_out:
            return rows, (columns + self.pad) // self.dim
        return (rows + self.pad) // self.dim, columns

    @property
    def _order(self) -> tuple[int, ...]:
        rest = [axis for axis in range(len(self.shape)) if axis not in (self.out_axis, self.in_axis)]
        first = [] if self.in_axis is None else [self.in_axis]
        last = [] if self.out_axis is None else [self.out_axis]
        return (*first, *rest, *last)

    def to_vectors(self, weight: Shaped[Array, "..."]) -> Shaped[Array, "g out d"]:
        """Cuts a weight of `self.shape` into vectors `[g, out, d]`, padding with zeros."""
        matrix = weight.transpose(self._order).reshape(self.matrix_shape)
        pads = ((0, 0), (0, self.pad)) if self.along_out else ((0, self.pad), (0, 0))
        matrix = jnp.pad(matrix, pads)
        groups, outs = self.grid
        if self.along_out:
            return matrix.reshape(groups, outs, self.dim)
        return matrix.reshape(groups, self.dim, outs).transpose(0, 2, 1)

    def from_vectors(self, vectors: Shaped[Array, "g out d"]) -> Shaped[Array, "..."]:
        """The weight of `self.shape` and `self.dtype` that `vectors` came from; drops the padding."""
        groups, outs = self.grid
        rows, columns = self.matrix_shape
        if self.along_out:
            matrix = vectors.reshape(groups, outs * self.dim)
        else:
            matrix = vectors.transpose(0, 2, 1).reshape(groups * self.dim, outs)
        order = self._order
        split = tuple(self.shape[axis] for axis in order)
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return matrix[:rows, :columns].reshape(split).transpose(inverse).astype(self.dtype)


def _input_axis(rank: int, out_axis: int | None, channels_last: bool) -> int | None:
    """The axis beside `out_axis`: of the last two where it is one of them (HWIO), else of the first two (OIHW)."""
    if out_axis is None or rank < 2:
        return None
    in_last_two, in_first_two = out_axis >= rank - 2, out_axis < 2
    if in_last_two and (channels_last or not in_first_two):
        return 2 * rank - 3 - out_axis
    if in_first_two:
        return 1 - out_axis
    return None
