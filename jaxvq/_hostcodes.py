"""Packed codes read on the host: in pieces, and without a program compiled for each new shape."""

from collections.abc import Iterator

import numpy as np

from jaxvq.bits import WORD, PackedCodes

PIECE = 1 << 18  # codes at a time: a multiple of WORD, so that pieces of one line begin with a word


def iter_codes(packed: PackedCodes) -> Iterator[tuple[int, tuple[int, int], np.ndarray]]:
    """The codes in pieces `(layer, (g, out), codes [piece of g, piece of out, m])`.

    `layer` counts the stacked layers, (g, out) is where the piece begins.
    """
    words = np.asarray(packed.words)
    bits, length = packed.bits, packed.length
    for layer, stacked in enumerate(words.reshape(-1, *words.shape[-3:])):
        lines = np.moveaxis(stacked, packed.axis, 0)  # [words, lines, m]
        step = max(1, PIECE // max(1, length * lines.shape[2]))
        for line in range(0, lines.shape[1], step):
            for start in range(0, length, PIECE):
                count = min(PIECE, length - start)
                block = lines[start * bits // WORD :, line : line + step][: -(-count * bits // WORD)]
                codes = np.moveaxis(_codes(block, bits, count), 0, packed.axis)
                yield layer, (line, start) if packed.axis else (start, line), codes


def _codes(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes [count, lines, m] of words [words, lines, m]."""
    low = words.astype(np.uint64)
    high = np.concatenate([low[1:], np.zeros_like(low[:1])])
    at = np.arange(count) * bits
    shift = (at % WORD).astype(np.uint64)[:, None, None]
    codes = (low | high << np.uint64(WORD))[at // WORD] >> shift & np.uint64(2**bits - 1)
    return codes.astype(np.uint32)
