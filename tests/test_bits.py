"""Packing against a bit-by-bit reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvq.bits import PackedCodes, pack, packed_axis, unpack, zero_codes


def reference_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The words of codes `[n]`, by writing out every bit."""
    stream = "".join(format(int(code), f"0{bits}b")[::-1] for code in codes)
    stream += "0" * (-len(stream) % 32)
    return np.array([int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)], np.uint32)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 16), groups=st.integers(1, 70), outs=st.integers(1, 4), stages=st.integers(1, 2))
def test_words_are_the_bit_stream(bits, groups, outs, stages):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (groups, outs, stages))
    packed = pack(jnp.asarray(codes), bits, axis=0)
    for out in range(outs):
        for stage in range(stages):
            np.testing.assert_array_equal(packed.words[:, out, stage], reference_words(codes[:, out, stage], bits))
    np.testing.assert_array_equal(unpack(packed), codes)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("shape", [(1, 40, 1), (3, 33, 2), (40, 1, 1), (65, 3, 1)])
def test_round_trip_and_shape(bits, shape):
    codes = np.random.default_rng(0).integers(0, 2**bits, shape)
    packed = pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(unpack(packed), codes)
    zeros = zero_codes(*shape, bits)
    assert (zeros.words.shape, zeros.axis, zeros.length) == (packed.words.shape, packed.axis, packed.length)
    assert packed.nbytes == packed.words.size * 4


def test_short_columns_are_packed_along_out():
    assert packed_axis(groups=1, outs=1000, bits=4) == 1
    assert packed_axis(groups=1000, outs=1, bits=4) == 0
    assert packed_axis(groups=1000, outs=1000, bits=3) == 0
    assert pack(jnp.zeros((1, 1000, 1), jnp.int32), 4).nbytes == 500


def test_bits_above_the_code_are_cut_off():
    assert int(unpack(pack(jnp.full((1, 1, 1), 0x13), 4))[0, 0, 0]) == 3


@pytest.mark.parametrize("bits", [0, 17, True])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"`bits` must be a whole number from 1 to 16, got"):
        pack(jnp.zeros((1, 1, 1), jnp.int32), bits)


def test_static_fields_are_structure():
    packed = pack(jnp.zeros((4, 1, 1), jnp.int32), 4)
    doubled = jax.tree.map(lambda words: words * 2, packed)
    assert isinstance(doubled, PackedCodes)
    assert (doubled.bits, doubled.length, doubled.axis) == (4, 4, 0)
