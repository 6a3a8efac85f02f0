"""The quantization methods: plain data that says how a weight becomes codes, and the only makers of `QuantizedArray`s.

A method is a frozen dataclass, hashable and writable as JSON. `layout` says how it cuts a weight, `template` which
shapes it will produce (nothing is computed, so a plan is free), and `fit` produces them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, final

from jaxtyping import Array, Float

from jaxvq import _fit
from jaxvq._checks import (
    check_codebook_dtype,
    check_count,
    check_enough,
    check_per,
    check_rate,
    checked_fraction,
    store_integers,
)
from jaxvq._method import (
    AbstractMethod,
    Per,
    affine_template,
    blocks_of,
    codebook_template,
    encode_codebook,
    entries_of,
    scalar_layout,
)
from jaxvq.array import Affine, QuantizedArray
from jaxvq.bits import check_bits
from jaxvq.layout import Layout

AFFINE_BITS = 8


@final
@dataclasses.dataclass(frozen=True)
class Uniform(AbstractMethod):
    """Evenly spaced levels from the smallest to the largest value: `min + (max - min) / (2**bits - 1) * code`.

    Attributes:
      bits: 1 to 8.
      per: one range for the tensor, one per output channel, or one per so many values along the input side.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2018, arXiv 1712.05877.

    Example:
      >>> Uniform(bits=8).layout((784, 128), "float32").grid
      (784, 128)
    """

    bits: int = 8
    per: Per = "tensor"

    def __post_init__(self) -> None:
        store_integers(self, "bits", "per")
        check_bits(self.bits, AFFINE_BITS)
        check_per(self.per)

    def layout(self, shape, dtype, *, out_axis=-1, channels_last=True) -> Layout:
        return scalar_layout(shape, dtype, out_axis, channels_last, self.per)

    def template(self, layout: Layout) -> QuantizedArray:
        return affine_template(layout, self.per, self.bits, has_zero_point=True)

    def decoder(self, weight: Float[Array, "..."], layout: Layout) -> Affine:
        """The levels for a weight."""
        return _fit.uniform(weight, layout=layout, blocks=blocks_of(layout, self.per), bits=self.bits)

    def fit(self, weight, layout, *, key, weights=None) -> QuantizedArray:
        del key, weights
        return _fit.encode(weight, None, self.decoder(weight, layout), layout=layout, bits=self.bits)


@final
@dataclasses.dataclass(frozen=True)
class Symmetric(AbstractMethod):
    """Evenly spaced levels around zero, for weights without an offset.

    With `q_max = 2**(bits - 1) - 1` and `scale = (max - min) / (2 q_max)` a weight becomes
    `scale * clip(round(w / scale), -q_max, q_max)`; at one bit it becomes `mean|w| * sign(w)`, zero counting as
    positive. Values beyond `q_max * scale` are clipped.

    Attributes:
      bits: 1 to 8.
      per: one scale for the tensor, one per output channel, or one per so many values along the input side.

    Source for one bit: Rastegari et al., "XNOR-Net", 2016, arXiv 1603.05279.

    Example:
      >>> Symmetric(bits=4, per="channel").to_json()
      {'method': 'Symmetric', 'bits': 4, 'per': 'channel'}
    """

    bits: int = 8
    per: Per = "tensor"

    def __post_init__(self) -> None:
        store_integers(self, "bits", "per")
        check_bits(self.bits, AFFINE_BITS)
        check_per(self.per)

    def layout(self, shape, dtype, *, out_axis=-1, channels_last=True) -> Layout:
        return scalar_layout(shape, dtype, out_axis, channels_last, self.per)

    def template(self, layout: Layout) -> QuantizedArray:
        return affine_template(layout, self.per, self.bits, has_zero_point=False)

    def decoder(self, weight: Float[Array, "..."], layout: Layout) -> Affine:
        """The levels for a weight."""
        return _fit.symmetric(weight, layout=layout, blocks=blocks_of(layout, self.per), bits=self.bits)

    def fit(self, weight, layout, *, key, weights=None) -> QuantizedArray:
        del key, weights
        return _fit.encode(weight, None, self.decoder(weight, layout), layout=layout, bits=self.bits)


@final
@dataclasses.dataclass(frozen=True)
class KMeans(AbstractMethod):
    """Palettes: each value becomes one of `k`, chosen optimally.

    Attributes:
      bits: 1 to 16, for `k = 2**bits`; 4 when neither is given.
      k: or the number of centroids; 13 is as good as 16.
      per: one palette for the tensor, one per output channel, or one per so many values along the input side.
      codebook_dtype: how centroids are stored: "float32", "bfloat16", or "int8" with a scale per palette.

    Source: Han, Mao and Dally, "Deep Compression", 2016, arXiv 1510.00149; the optimal centroids: Grønlund et al.,
    2017, arXiv 1701.07204.

    Example:
      >>> KMeans(bits=4, per="channel").entries
      16
    """

    bits: int | None = None
    k: int | None = None
    per: Per = "tensor"
    codebook_dtype: str = "float32"

    def __post_init__(self) -> None:
        store_integers(self, "bits", "k", "per")
        check_rate(self.bits, self.k)
        check_per(self.per)
        check_codebook_dtype(self.codebook_dtype)

    @property
    def entries(self) -> int:
        """Centroids per palette."""
        return entries_of(self.bits, self.k, default_bits=4)

    def layout(self, shape, dtype, *, out_axis=-1, channels_last=True) -> Layout:
        return scalar_layout(shape, dtype, out_axis, channels_last, self.per)

    def template(self, layout: Layout) -> QuantizedArray:
        blocks = blocks_of(layout, self.per)
        values = layout.size if self.per == "tensor" else layout.matrix_shape[0]
        check_enough(self.entries, min(values, self.per) if isinstance(self.per, int) else values, "values")
        return codebook_template(layout, (*blocks, 1, self.entries, 1), self.codebook_dtype)

    def fit(self, weight, layout, *, key, weights=None) -> QuantizedArray:
        del key
        weights = _fit.importance_of(weights, layout=layout)
        vectors = _fit.palettes(weight, weights, layout=layout, blocks=blocks_of(layout, self.per), k=self.entries)
        return encode_codebook(weight, None, vectors, layout, self.codebook_dtype)


@final
@dataclasses.dataclass(frozen=True)
class RowVQ(AbstractMethod):
    """Vector quantization of whole output features: each becomes one of `k` rows.

    Attributes:
      fraction: `k = max(int(out * fraction), 1)`; a tenth when neither is given.
      k: or the number of rows in the codebook.
      codebook_dtype: how rows are stored: "float32", "bfloat16", or "int8" with a scale.
      iterations: of k-means.

    Example:
      >>> layout = RowVQ(fraction=0.1).layout((784, 128), "float32")
      >>> RowVQ(fraction=0.1).template(layout).decoder.vectors.shape
      (1, 1, 1, 12, 784)
    """

    fraction: float | None = None
    k: int | None = None
    codebook_dtype: str = "float32"
    iterations: int = 25

    def __post_init__(self) -> None:
        if self.fraction is not None and self.k is not None:
            raise ValueError(f"`fraction` and `k` exclude each other, got {self.fraction} and {self.k}; give one")
        store_integers(self, "k", "iterations")
        if self.fraction is not None:
            object.__setattr__(self, "fraction", checked_fraction(self.fraction))
        check_rate(None, self.k)
        check_codebook_dtype(self.codebook_dtype)
        check_count("iterations", self.iterations)

    def layout(self, shape, dtype, *, out_axis=-1, channels_last=True) -> Layout:
        whole = Layout.of(shape, dtype, out_axis=out_axis, channels_last=channels_last)
        return dataclasses.replace(whole, dim=whole.matrix_shape[0])

    def entries(self, outs: int) -> int:
        """Rows in the codebook for `outs` output features."""
        return self.k or max(int(outs * (0.1 if self.fraction is None else self.fraction)), 1)

    def template(self, layout: Layout) -> QuantizedArray:
        outs = layout.grid[1]
        check_enough(self.entries(outs), outs, "output features")
        return codebook_template(layout, (1, 1, 1, self.entries(outs), layout.dim), self.codebook_dtype)

    def fit(self, weight, layout, *, key, weights=None) -> QuantizedArray:
        weights = _fit.importance_of(weights, layout=layout)
        vectors = _fit.product(
            weight,
            weights,
            key,
            layout=layout,
            subspaces=False,
            k=self.entries(layout.grid[1]),
            iterations=self.iterations,
        )
        return encode_codebook(weight, weights, vectors, layout, self.codebook_dtype)


@final
@dataclasses.dataclass(frozen=True)
class Product(AbstractMethod):
    """Product quantization: vectors of `dim` values along the input side become one of `k` each.

    A Dense kernel is cut along its input features, a Conv kernel along the flattened (in, height, width) of each
    filter: with `dim=9` a 3x3 kernel has one vector per two-dimensional filter.

    Attributes:
      bits: 1 to 16, for `k = 2**bits`; 8 when neither is given.
      k: or the number of centroids in a codebook.
      dim: values per vector.
      codebooks: one "shared" by the whole weight, or one per "subspace" (per place along the input side).
      codebook_dtype: how centroids are stored: "float32", "bfloat16", or "int8" with a scale per codebook.
      iterations: of k-means (EM).

    Source: Stock et al., "And the Bit Goes Down: Revisiting the Quantization of Neural Networks", 2020, arXiv
    1907.05686; Jegou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", 2011.

    Example:
      >>> method = Product(bits=8, dim=4)
      >>> method.template(method.layout((784, 128), "float32")).bits_per_weight
      2.326530612244898
    """

    bits: int | None = None
    k: int | None = None
    dim: int = 4
    codebooks: Literal["shared", "subspace"] = "shared"
    codebook_dtype: str = "float32"
    iterations: int = 25

    def __post_init__(self) -> None:
        store_integers(self, "bits", "k", "dim", "iterations")
        check_rate(self.bits, self.k)
        check_count("dim", self.dim)
        check_count("iterations", self.iterations)
        check_codebook_dtype(self.codebook_dtype)
        if self.codebooks not in ("shared", "subspace"):
            raise ValueError(f'`codebooks` must be "shared" or "subspace", got {self.codebooks!r}')

    @property
    def entries(self) -> int:
        """Centroids per codebook."""
        return entries_of(self.bits, self.k, default_bits=8)

    def layout(self, shape, dtype, *, out_axis=-1, channels_last=True) -> Layout:
        return Layout.of(shape, dtype, out_axis=out_axis, channels_last=channels_last, dim=self.dim)

    def template(self, layout: Layout) -> QuantizedArray:
        groups, outs = layout.grid
        subspaces = groups if self.codebooks == "subspace" else 1
        check_enough(self.entries, groups * outs // subspaces, f"vectors of {self.dim} values")
        return codebook_template(layout, (subspaces, 1, 1, self.entries, self.dim), self.codebook_dtype)

    def fit(self, weight, layout, *, key, weights=None) -> QuantizedArray:
        weights = _fit.importance_of(weights, layout=layout)
        subspaces = self.codebooks == "subspace"
        vectors = _fit.product(
            weight, weights, key, layout=layout, subspaces=subspaces, k=self.entries, iterations=self.iterations
        )
        return encode_codebook(weight, weights, vectors, layout, self.codebook_dtype)


@final
@dataclasses.dataclass(frozen=True)
class Residual(AbstractMethod):
    """Residual (additive) quantization: a vector becomes the sum of one centroid from each stage's codebook.

    Attributes:
      stages: codebooks that are added up.
      bits: 1 to 16, for `2**bits` centroids in each; 8 when neither is given.
      k: or the number of centroids in each.
      dim: values per vector.
      codebook_dtype: how centroids are stored: "float32", "bfloat16", or "int8" with a scale per stage.
      iterations: of k-means, per stage.

    Source: Chen, Guan and Wang, "Approximate Nearest Neighbor Search by Residual Vector Quantization", 2010; Babenko
    and Lempitsky, "Additive Quantization for Extreme Vector Compression", 2014.

    Example:
      >>> method = Residual(stages=2, bits=8, dim=8)
      >>> method.template(method.layout((4096, 4096), "float32")).codes.words.shape
      (128, 4096, 2)
    """

    stages: int = 2
    bits: int | None = None
    k: int | None = None
    dim: int = 8
    codebook_dtype: str = "float32"
    iterations: int = 25

    def __post_init__(self) -> None:
        store_integers(self, "stages", "bits", "k", "dim", "iterations")
        check_count("stages", self.stages)
        check_rate(self.bits, self.k)
        check_count("dim", self.dim)
        check_count("iterations", self.iterations)
        check_codebook_dtype(self.codebook_dtype)

    @property
    def entries(self) -> int:
        """Centroids per stage."""
        return entries_of(self.bits, self.k, default_bits=8)

    def layout(self, shape, dtype, *, out_axis=-1, channels_last=True) -> Layout:
        return Layout.of(shape, dtype, out_axis=out_axis, channels_last=channels_last, dim=self.dim)

    def template(self, layout: Layout) -> QuantizedArray:
        check_enough(self.entries, math.prod(layout.grid), f"vectors of {self.dim} values")
        return codebook_template(layout, (1, 1, self.stages, self.entries, self.dim), self.codebook_dtype)

    def fit(self, weight, layout, *, key, weights=None) -> QuantizedArray:
        weights = _fit.importance_of(weights, layout=layout)
        vectors = _fit.residual(
            weight, weights, key, layout=layout, k=self.entries, stages=self.stages, iterations=self.iterations
        )
        return encode_codebook(weight, weights, vectors, layout, self.codebook_dtype)


METHODS: tuple[type[AbstractMethod], ...] = (Uniform, Symmetric, KMeans, RowVQ, Product, Residual)


def method_from_json(data: Mapping[str, Any]) -> AbstractMethod:
    """The method that `to_json` wrote.

    Raises:
      ValueError: for a name or a field that does not exist, or a value out of range.

    Example:
      >>> method_from_json({"method": "KMeans", "bits": 4})
      KMeans(bits=4, k=None, per='tensor', codebook_dtype='float32')
    """
    by_name = {cls.__name__: cls for cls in METHODS}
    name = data.get("method") if isinstance(data, Mapping) else None
    if not isinstance(name, str) or name not in by_name:
        raise ValueError(f'`method` must be {{"method": NAME, ...}} with one of {", ".join(by_name)}, got {data!r}')
    cls = by_name[name]
    fields = {name: value for name, value in data.items() if name != "method"}
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"`{cls.__name__}` has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    return cls(**fields)
