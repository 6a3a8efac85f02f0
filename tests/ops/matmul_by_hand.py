"""Quantized matrices and their gradients in float64 by numpy, without a line of the library."""

import numpy as np


def codes_by_hand(w):
    """[g, out, m]."""
    words = np.asarray(w.codes.words).transpose(1, 2, 0)
    bits = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=2, bitorder="little")
    bits = bits[:, :, : w.codes.length * w.codes.bits].reshape(*words.shape[:2], w.codes.length, w.codes.bits)
    return (bits @ 2 ** np.arange(w.codes.bits)).transpose(2, 0, 1)


def block_of(part, codes):
    """Which (#g, #out) of `part` each code [g, out, m] belongs to."""
    g, out, _ = codes.shape
    return np.arange(g)[:, None] // (g // part.shape[0]), np.arange(out) // (out // part.shape[1])


def parts_by_hand(w):
    """(codes, vectors, scale, zero point): either vectors or a zero point, and scales of 1 where there are none."""
    decoder, codes = w.decoder, codes_by_hand(w)
    if hasattr(decoder, "zero_point"):
        zero = 0.5 if w.codes.bits == 1 else 2.0 ** (w.codes.bits - 1) - 1
        zero = np.full((1, 1, 1), zero) if decoder.zero_point is None else np.asarray(decoder.zero_point, np.float64)
        return codes, None, np.asarray(decoder.scale, np.float64), zero
    scale = np.ones((1, 1, 1, 1, 1)) if decoder.scale is None else np.asarray(decoder.scale, np.float64)
    return codes, np.asarray(decoder.vectors, np.float64), scale, None


def weight_by_hand(w):
    """[in, out]."""
    codes, vectors, scale, zero = parts_by_hand(w)
    if vectors is None:
        values = (codes - zero[block_of(zero, codes)]) * scale[block_of(scale, codes)]
    else:
        values = sum(
            scale[*block_of(scale, codes), min(m, scale.shape[2] - 1), 0]
            * vectors[*block_of(vectors, codes), m, codes[:, :, m]]
            for m in range(codes.shape[2])
        )
    return values.transpose(0, 2, 1).reshape(-1, codes.shape[1])[: w.shape[0]]


def gradients_by_hand(w, of_weight):
    """Those of the decoder's floating-point parts, from that of the weight [in, out]."""
    codes, vectors, scale, zero = parts_by_hand(w)
    g, out, stages = codes.shape
    padded = np.pad(of_weight, ((0, w.layout.pad), (0, 0)))
    of_values = padded.reshape(g, w.layout.dim, out).transpose(0, 2, 1)
    of_scale, of_rest = np.zeros_like(scale), np.zeros_like(zero if vectors is None else vectors)
    if vectors is None:
        np.add.at(of_scale, block_of(scale, codes), of_values * (codes - zero[block_of(zero, codes)]))
        np.add.at(of_rest, block_of(zero, codes), -of_values * scale[block_of(scale, codes)])
        return [of_scale, of_rest] if w.decoder.zero_point is not None else [of_scale]
    for m in range(stages):
        of_entry = *block_of(vectors, codes), m, codes[:, :, m]
        stage = *block_of(scale, codes), min(m, scale.shape[2] - 1), 0
        np.add.at(of_rest, of_entry, of_values * scale[stage])
        np.add.at(of_scale, stage, (of_values * vectors[of_entry]).sum(axis=2, keepdims=True))
    return [of_scale] if w.decoder.vectors.dtype == "int8" else [of_rest]
