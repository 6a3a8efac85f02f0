"""The product with codes of vectors by tables of inner products, for processors that look numbers up fast.

All that a vector can add to an output is its inner product with the inputs that it meets. Those of every entry with
every part of a row of `x` are a table as small as the codebook is beside the weight, and a code then takes one number
out of it, where decoding takes a vector.

Source: Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", IEEE TPAMI 33(1), 2011 (there for
distances).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxvq.array import Codebook, QuantizedArray
from jaxvq.bits import unpack, whole_words

VALUES_LEAST = 2**20  # of a weight; smaller ones are decoded as fast
NUMBERS_MOST = 2**11  # of several rows for one code, so that a table stays in the cache


def has_tables(rows: int, w: QuantizedArray) -> bool:
    """Whether tables make a product faster than decoding.

    They do for a row and one codebook, and for a few rows where decoding adds up several stages. The codes must follow
    each other along the input side.
    """
    decoder, outs = w.decoder, w.layout.grid[1]
    if not isinstance(decoder, Codebook) or w.layout.dim == 1 or math.prod(w.layout.matrix_shape) < VALUES_LEAST:
        return False
    parts = [decoder.vectors] if decoder.scale is None else [decoder.vectors, decoder.scale]
    stages, entries = decoder.vectors.shape[2:4]
    few = rows == 1 or (stages > 1 and 0 < rows <= w.layout.dim and rows * entries <= NUMBERS_MOST)
    return few and entries <= outs and all(part.shape[:2] == (1, 1) for part in parts)


# Jitted, so that calls outside of jit are compiled once.
@functools.partial(jax.jit, static_argnames="precision")
def table_product(x: Float[Array, "n a"], w: QuantizedArray, *, precision: lax.PrecisionLike) -> Float[Array, "n b"]:
    """`x` times the layout's matrix of `w`; see `has_tables`. The sums are float32.

    Args:
      x: `[n, a]`.
      w: a weight of vectors from one codebook.
      precision: of the inner products.
    """
    assert isinstance(w.decoder, Codebook)
    outs, stages = w.layout.grid[1], w.codes.words.shape[2]
    words_of_step, codes_of_step = whole_words(w.codes.bits)
    steps = -(-w.codes.length // codes_of_step)
    vectors = w.decoder.vectors[0, 0].astype(jnp.float32)
    if w.decoder.scale is not None:
        vectors = vectors * w.decoder.scale[0, 0].astype(jnp.float32)
    missing = steps * codes_of_step * w.layout.dim - x.shape[1]
    parts = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, missing))).reshape(-1, steps, codes_of_step, w.layout.dim)
    tables = jnp.einsum("nscd,mkd->scmnk", parts, vectors, precision=precision)
    words = jnp.pad(w.codes.words, ((0, steps * words_of_step - w.codes.words.shape[0]), (0, 0), (0, 0)))

    def add(sums: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        tables, words = step
        codes = unpack(dataclasses.replace(w.codes, words=words, length=codes_of_step)).astype(jnp.int32)
        for code in range(codes_of_step):
            for stage in range(stages):
                sums = sums + tables[code, stage].at[:, codes[code, :, stage]].get(mode="clip")
        return sums, None

    start = jnp.zeros((x.shape[0], outs), jnp.float32)
    sums, _ = lax.scan(add, start, (tables, words.reshape(steps, words_of_step, outs, stages)))
    return sums.astype(x.dtype)
