"""What a quantization method is, and what several of them do alike."""

import abc
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvq import _fit
from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.bits import zero_codes
from jaxvq.layout import Layout

Per = Literal["tensor", "channel"] | int


class AbstractMethod(abc.ABC):
    """How weights become codes."""

    @abc.abstractmethod
    def layout(
        self, shape: tuple[int, ...], dtype: Any, *, out_axis: int | None = -1, channels_last: bool = True
    ) -> Layout:
        """How this method cuts a weight of `shape` into vectors; see `Layout.of` for the arguments."""

    @abc.abstractmethod
    def template(self, layout: Layout) -> QuantizedArray:
        """What `fit` returns, with `jax.ShapeDtypeStruct`s for arrays.

        Raises:
          ValueError: when a weight of this layout is too small for the method.
        """

    @abc.abstractmethod
    def fit(
        self,
        weight: Float[Array, "..."],
        layout: Layout,
        *,
        key: Array,
        weights: Float[Array, "..."] | None = None,
    ) -> QuantizedArray:
        """Quantizes one weight.

        Args:
          weight: in the shape of the layout.
          layout: from `self.layout`.
          key: random key; methods without randomness ignore it.
          weights: the importance of each value, in the weight's shape; methods that do not cluster ignore it.
        """

    def to_json(self) -> dict[str, Any]:
        """The method as plain data: its name under `"method"`, and its fields."""
        return {"method": type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    def __str__(self) -> str:
        """The method as it is written in code, without the fields that are at their defaults."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        set_fields = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(set_fields)})"


def scalar_layout(shape: tuple[int, ...], dtype: Any, out_axis: int | None, channels_last: bool, per: Per) -> Layout:
    """The layout of single values, the input side padded to whole groups."""
    layout = Layout.of(shape, dtype, out_axis=out_axis, channels_last=channels_last)
    return (
        dataclasses.replace(layout, pad=-layout.matrix_shape[0] % _group(layout, per))
        if isinstance(per, int)
        else layout
    )


def _group(layout: Layout, per: int) -> int:
    """The group size, which is at most the input side."""
    return min(per, layout.matrix_shape[0])


def blocks_of(layout: Layout, per: Per) -> tuple[int, int]:
    """How many ranges or palettes lie along (g, out)."""
    groups, outs = layout.grid
    if isinstance(per, int):
        return groups // _group(layout, per), outs
    return (1, outs) if per == "channel" else (1, 1)


def affine_template(layout: Layout, per: Per, bits: int, *, has_zero_point: bool) -> QuantizedArray:
    """The shapes of codes of evenly spaced levels."""

    def build() -> QuantizedArray:
        scale = jnp.zeros((*blocks_of(layout, per), 1))
        return QuantizedArray(
            zero_codes(*layout.grid, 1, bits), Affine(scale, scale if has_zero_point else None), layout
        )

    return jax.eval_shape(build)


def codebook_template(layout: Layout, shape: tuple[int, int, int, int, int], dtype: str) -> QuantizedArray:
    """The shapes of codes of a codebook of `shape`, `[g_blocks, out_blocks, m, k, d]`."""

    def build() -> QuantizedArray:
        scale = jnp.zeros((*shape[:3], 1, 1)) if dtype == "int8" else None
        codes = zero_codes(*layout.grid, shape[2], _fit.code_bits(shape[3]))
        return QuantizedArray(codes, Codebook(jnp.zeros(shape, dtype), scale), layout)

    return jax.eval_shape(build)


def encode_codebook(weight: Array, weights: Array | None, vectors: Array, layout: Layout, dtype: str) -> QuantizedArray:
    """The codes of a codebook as it is stored."""
    codebook = _fit.round_codebook(vectors, dtype)
    return _fit.encode(weight, weights, codebook, layout=layout, bits=_fit.code_bits(vectors.shape[3]))


def entries_of(bits: int | None, k: int | None, *, default_bits: int) -> int:
    """How many centroids either of `bits` and `k` asks for."""
    if k is not None:
        return k
    return 2 ** (default_bits if bits is None else bits)
