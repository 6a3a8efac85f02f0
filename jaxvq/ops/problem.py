"""A product with a quantized matrix as its kernels see it: sizes and types."""

import dataclasses
import math
from typing import Any

from jaxtyping import Array

from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.bits import whole_words, word_count


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a product, which a kernel is compiled for.

    Attributes:
      rows: of x.
      inputs: columns of x.
      dtype: of x.
      w: the weight; only its shapes and dtypes count.
      expand: the weight itself is wanted.
    """

    rows: int
    inputs: int
    dtype: Any
    w: QuantizedArray
    expand: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.w.codes.bits

    @property
    def dim(self) -> int:
        """Values of a code."""
        return self.w.layout.dim

    @property
    def outputs(self) -> int:
        """Columns of the product."""
        return self.w.layout.grid[1]

    @property
    def stages(self) -> int:
        """Codes that are added up."""
        return self.w.codes.words.shape[2]

    @property
    def unit(self) -> tuple[int, int]:
        """(words, codes) of the fewest words of an output that end where a code and eight values end."""
        words, codes = whole_words(self.bits)
        while codes * self.dim % 8:
            words, codes = 2 * words, 2 * codes
        return words, codes

    @property
    def units(self) -> int:
        """Along the input side."""
        return math.ceil(word_count(self.w.codes.length, self.bits) / self.unit[0])

    @property
    def turns(self) -> int:
        """Times that the four quads of a warp take turns along the input side."""
        return math.ceil(self.units / 4)

    @property
    def parts(self) -> tuple[Array | None, Array | None, Array | None]:
        """(vectors, scale, zero point) of the decoder."""
        decoder = self.w.decoder
        if isinstance(decoder, Affine):
            return None, decoder.scale, decoder.zero_point
        assert isinstance(decoder, Codebook)
        return decoder.vectors, decoder.scale, None

    @property
    def blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(#g, #out) of the vectors or zero points, and (#g, #out, #m) of the scales."""
        vectors, scale, zero = self.parts
        table = vectors if vectors is not None else zero
        return (1, 1) if table is None else table.shape[:2], (1, 1, 1) if scale is None else scale.shape[:3]

    @property
    def groups(self) -> int:
        """Parts of the input side with a decoder of their own."""
        table, scale = self.blocks
        return max(table[0], scale[0])

    @property
    def group_turns(self) -> int:
        """Turns in one of the groups."""
        return self.w.codes.length // self.groups // (4 * self.unit[1])
