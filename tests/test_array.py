"""Every decoder against a loop in numpy, and everything JAX may do with a quantized array."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DECODERS, normal

from jaxvq.array import Affine, Codebook, QuantizedArray, combine, partition
from jaxvq.bits import pack
from jaxvq.layout import Layout

every_decoder = pytest.mark.parametrize("array", DECODERS.values(), ids=DECODERS.keys())


def decode_by_loop(array: QuantizedArray) -> np.ndarray:
    """The weight matrix `[in, out]`, one value at a time."""
    codes = np.asarray(array.unpack(), np.int64)
    groups, outs, stages = codes.shape
    dim, bits = array.layout.dim, array.codes.bits
    matrix = np.zeros((groups * dim, outs))
    for g, out in np.ndindex(groups, outs):
        if isinstance(array.decoder, Affine):
            scale = np.asarray(array.decoder.scale)
            at = (g * scale.shape[0] // groups, out * scale.shape[1] // outs, 0)
            zero = array.decoder.zero_point
            middle = (2 ** (bits - 1) - 1 if bits > 1 else 0.5) if zero is None else np.asarray(zero)[at]
            matrix[g, out] = (codes[g, out, 0] - middle) * scale[at]
            continue
        vectors = np.asarray(array.decoder.vectors, np.float32)
        at = (g * vectors.shape[0] // groups, out * vectors.shape[1] // outs)
        for m in range(stages):
            scale = 1.0 if array.decoder.scale is None else np.asarray(array.decoder.scale)[0, 0, m, 0, 0]
            matrix[g * dim : (g + 1) * dim, out] += scale * vectors[*at, m, codes[g, out, m]]
    return matrix


@every_decoder
def test_decodes_like_the_definition(array):
    array.validate()
    np.testing.assert_allclose(array.dequantize(), decode_by_loop(array), rtol=1e-5, atol=1e-5)


@every_decoder
def test_same_under_jit(array):
    np.testing.assert_array_equal(jax.jit(lambda a: a.dequantize())(array), array.dequantize())


@every_decoder
def test_gradient_is_the_sum_over_shared_weights(array):
    trainable, frozen = partition(array)
    upstream = normal(*array.shape)
    grad = jax.grad(lambda t: jnp.vdot(upstream, combine(t, frozen).dequantize()))(trainable)
    assert jax.tree.structure(grad) == jax.tree.structure(trainable)
    names = [name for name in ("scale", "zero_point", "vectors") if getattr(trainable.decoder, name, None) is not None]
    for name in names:
        leaf = np.asarray(getattr(array.decoder, name), np.float32)
        at = (0,) * leaf.ndim
        wide = dataclasses.replace(array.decoder, **{name: jnp.asarray(leaf)})
        moved = dataclasses.replace(array.decoder, **{name: jnp.asarray(leaf).at[at].add(1.0)})
        change = decode_by_loop(dataclasses.replace(array, decoder=moved)) - decode_by_loop(
            dataclasses.replace(array, decoder=wide)
        )
        expected = np.vdot(upstream, change)
        got = float(getattr(grad.decoder, name)[at])
        assert got == pytest.approx(expected, rel=2e-2 if leaf.size and name == "vectors" else 1e-3, abs=1e-3)


@every_decoder
def test_scan_and_vmap_over_stacked_layers(array):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), array)
    assert stacked.shape == (2, *array.shape)
    assert stacked.nbytes == 2 * array.nbytes
    stacked.validate()
    one = array.dequantize()
    np.testing.assert_array_equal(stacked.dequantize(), jnp.stack([one, one]))
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, layer.dequantize()), 0, stacked)
    np.testing.assert_array_equal(scanned, jnp.stack([one, one]))


@every_decoder
def test_size_is_what_the_leaves_take(array):
    nbytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(array))
    assert array.nbytes == nbytes
    assert array.bits_per_weight == 8 * nbytes / np.prod(array.shape)
    assert (array.ndim, array.size, str(array.dtype)) == (2, 24 * 6, "float32")


def test_dequantize_is_compiled_once():
    array = DECODERS["product, shared"]
    decode = jax.jit(lambda a: a.dequantize())
    for _ in range(3):
        decode(jax.tree.map(lambda leaf: leaf, array))
    assert decode._cache_size() == 1


def test_partition_keeps_codes_from_the_optimizer():
    tree = {"q": DECODERS["palette per tensor"], "bias": jnp.ones(3), "step": jnp.int32(4)}
    trainable, frozen = partition(tree)
    assert [str(leaf.dtype) for leaf in jax.tree.leaves(trainable)] == ["float32", "float32"]
    assert [str(leaf.dtype) for leaf in jax.tree.leaves(frozen)] == ["uint32", "int32"]
    assert trainable["step"] is None
    joined = combine(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True))


def test_int8_codebook_does_not_train():
    trainable, frozen = partition(DECODERS["residual, int8"])
    assert trainable.decoder.vectors is None
    assert frozen.decoder.scale is None


def test_code_beyond_the_codebook():
    array = QuantizedArray(
        pack(jnp.full((4, 2, 1), 13), 4), Codebook(normal(1, 1, 1, 13, 1)), Layout.of((4, 2), "float32")
    )
    with pytest.raises(ValueError, match="`codes` must be below the 13 entries of the decoder, got 13"):
        array.validate()


def test_codes_of_another_layout():
    array = dataclasses.replace(DECODERS["palette per tensor"], layout=Layout.of((25, 6), "float32"))
    with pytest.raises(ValueError, match=r"`codes` must be \[25, 6, m\]"):
        array.validate()


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (Codebook(normal(5, 1, 1, 13, 1)), r"`vectors` must have first axes that divide \(g, out\) = \(24, 6\)"),
        (Codebook(normal(1, 1, 2, 13, 1)), "with m=1 and d=1"),
        (Codebook(normal(1, 1, 1, 13, 2)), "with m=1 and d=1"),
        (Codebook(normal(1, 1, 1, 13, 1), normal(1, 4, 1, 1, 1)), "`scale` must have first axes that divide"),
        (Codebook(normal(1, 1, 1, 13, 1), normal(1, 1, 3, 1, 1)), "`scale` must have 1 or 1 stages"),
        (Affine(normal(1, 4, 1)), "`scale` must have first axes that divide"),
        (Affine(normal(1, 1, 1), normal(7, 1, 1)), "`zero_point` must have first axes that divide"),
    ],
)
def test_decoder_of_another_layout(decoder, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DECODERS["palette per tensor"], decoder=decoder).validate()


def test_affine_takes_single_values_only():
    with pytest.raises(ValueError, match="`Affine` decodes single values, got dim=4 and 1 stages"):
        dataclasses.replace(DECODERS["product, shared"], decoder=Affine(normal(1, 1, 1))).validate()


def test_numpy_is_refused():
    array = DECODERS["palette per tensor"]
    with pytest.raises(TypeError, match=r"got a QuantizedArray, which holds codes; call .dequantize\(\)"):
        np.asarray(array)
    with pytest.raises(TypeError, match=r"call .dequantize\(\)"):
        jnp.asarray(array)
    same = copy.deepcopy(array)
    assert jax.tree.structure(same) == jax.tree.structure(array)
    np.testing.assert_array_equal(same.dequantize(), array.dequantize())


def test_partition_freezes_what_is_no_array():
    tree = {"act": jnp.tanh, "key": jax.random.key(0), "name": "relu", "rate": 0.5, "w": jnp.ones(2)}
    trainable, frozen = partition(tree)
    assert sorted(name for name, leaf in trainable.items() if leaf is not None) == ["rate", "w"]
    assert combine(trainable, frozen) is not None
    assert frozen["name"] == "relu"
    assert frozen["act"] is jnp.tanh
