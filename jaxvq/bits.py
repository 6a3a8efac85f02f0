"""Codes packed into 32-bit words.

The codes along one axis form a stream of bits, lowest bit first: code `i` fills bits `i * bits` to
`(i + 1) * bits - 1`, and bit `b` of the stream is bit `b % 32` of word `b // 32`. A code may begin in one word and
end in the next, so `n` codes take `ceil(n * bits / 32)` words and no more.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt32

from jaxvq._pytree import pytree_dataclass, static

WORD = 32
MAX_BITS = 16


@pytree_dataclass
class PackedCodes:
    """Codes `[g, out, m]`, packed along `g` (`axis` 0) or along `out` (`axis` 1).

    Attributes:
      words: the packed words; the packed axis is `ceil(length * bits / 32)` long. Axes before the last three stack
        the codes of several layers.
      bits: bits per code, 1 to 16.
      length: codes along the packed axis.
      axis: which of (g, out) is packed.
    """

    words: UInt32[Array, "*stack g_words out_words m"]
    bits: int = static()
    length: int = static()
    axis: int = static(default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the words."""
        return self.words.size * WORD // 8


def word_count(length: int, bits: int) -> int:
    """Words that `length` codes of `bits` bits take."""
    return -(-length * bits // WORD)


def whole_words(bits: int) -> tuple[int, int]:
    """(words, codes): the fewest words that end where a code ends."""
    codes = WORD // math.gcd(bits, WORD)
    return codes * bits // WORD, codes


def packed_axis(groups: int, outs: int, bits: int) -> int:
    """Along which of (g, out) to pack: 0, which kernels read best, unless 1 takes over a tenth fewer words."""
    along_groups = word_count(groups, bits) * outs
    along_outs = word_count(outs, bits) * groups
    return 1 if 10 * along_groups > 11 * along_outs else 0


def pack(codes: Integer[Array, "g out m"], bits: int, *, axis: int | None = None) -> PackedCodes:
    """Packs codes, each in `0 .. 2**bits - 1` (higher bits are cut off), along `axis` or what `packed_axis` says.

    Example:
      >>> packed = pack(jnp.arange(8).reshape(8, 1, 1), bits=4)
      >>> hex(int(packed.words[0, 0, 0]))
      '0x76543210'
    """
    check_bits(bits, MAX_BITS)
    groups, outs, _ = codes.shape
    axis = packed_axis(groups, outs, bits) if axis is None else axis
    stream = jnp.moveaxis(codes.astype(jnp.uint32), axis, 0) & (2**bits - 1)
    length = stream.shape[0]
    starts = np.arange(word_count(length, bits)) * WORD
    words = jnp.zeros((starts.size, *stream.shape[1:]), jnp.uint32)
    for step in range(-(-WORD // bits) + 1):
        index = starts // bits + step
        shift = index * bits - starts  # from -bits + 1 to beyond the word
        inside = (shift < WORD) & (index < length)
        left, right = (np.clip(s, 0, WORD - 1).astype(np.uint32)[:, None, None] for s in (shift, -shift))
        part = stream[np.minimum(index, length - 1)] << left >> right
        words = words | jnp.where(inside[:, None, None], part, 0)
    return PackedCodes(jnp.moveaxis(words, 0, axis), bits=bits, length=length, axis=axis)


def unpack(packed: PackedCodes) -> UInt32[Array, "g out m"]:
    """The codes `[g, out, m]` of `packed`, one 32-bit integer each."""
    bits = packed.bits
    words = jnp.moveaxis(packed.words, packed.axis, 0)
    start = np.arange(packed.length) * bits
    first, shift = start // WORD, (start % WORD).astype(np.uint32)[:, None, None]
    codes = words[first] >> shift
    if WORD % bits:
        crosses = shift + bits > WORD
        rest = words[np.minimum(first + 1, words.shape[0] - 1)] << np.where(crosses, WORD - shift, 0)
        codes = codes | jnp.where(crosses, rest, 0)
    return jnp.moveaxis(codes & (2**bits - 1), 0, packed.axis)


def check_bits(bits: int, most: int) -> None:
    """Raises ValueError unless `bits` is a whole number from 1 to `most`."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= most:
        raise ValueError(f"`bits` must be a whole number from 1 to {most}, got {bits!r}; use for example bits=4")


def zero_codes(groups: int, outs: int, stages: int, bits: int) -> PackedCodes:
    """What `pack` returns for codes `[groups, outs, stages]` that are all zero."""
    axis = packed_axis(groups, outs, bits)
    length = outs if axis else groups
    shape = (groups, word_count(outs, bits), stages) if axis else (word_count(groups, bits), outs, stages)
    return PackedCodes(jnp.zeros(shape, jnp.uint32), bits=bits, length=length, axis=axis)
