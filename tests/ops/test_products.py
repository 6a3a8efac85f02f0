"""Products, rows and convolutions of quantized weights equal those of the weights that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DECODERS, METHODS

import jaxvq
from jaxvq.array import partition
from jaxvq.methods import KMeans, Product, RowVQ
from jaxvq.ops.conv import conv, conv_transpose
from jaxvq.ops.matmul import matmul
from jaxvq.ops.take import take

every_decoder = pytest.mark.parametrize("array", DECODERS.values(), ids=DECODERS.keys())


@every_decoder
@pytest.mark.parametrize("transpose", [False, True])
def test_matmul(array, transpose, rng):
    x = jnp.asarray(rng.normal(size=(2, 5, array.shape[1 if transpose else 0])), jnp.float32)
    weight = np.asarray(array.dequantize(), np.float64)
    expected = np.asarray(x, np.float64) @ (weight.T if transpose else weight)
    np.testing.assert_allclose(
        jax.jit(matmul, static_argnames="transpose")(x, array, transpose=transpose), expected, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(
        matmul(x, array.dequantize(), transpose=transpose), matmul(x, array, transpose=transpose)
    )


@every_decoder
def test_matmul_gradients(array, rng):
    x = jnp.asarray(rng.normal(size=(5, 24)), jnp.float32)
    trainable, frozen = partition(array)

    def ours(x, trainable):
        return jnp.sum(matmul(x, jaxvq.combine(trainable, frozen)) ** 2)

    def reference(x, trainable):
        array = jaxvq.combine(trainable, frozen)
        codes = array.unpack()
        weight = array.layout.from_vectors(array.decoder.decode(codes, array.codes.bits))
        return jnp.sum((x @ weight) ** 2)

    for a, b in zip(
        *(jax.tree.leaves(jax.grad(f, argnums=(0, 1))(x, trainable)) for f in (ours, reference)), strict=True
    ):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2 if a.dtype == jnp.bfloat16 else 1e-4, atol=1e-4
        )


def test_matmul_computes_in_the_dtype_of_x(rng):
    array = DECODERS["palette per tensor"]
    x = jnp.asarray(rng.normal(size=(5, 24)), jnp.bfloat16)
    assert matmul(x, array).dtype == jnp.bfloat16


def test_matmul_over_stacked_layers(rng, key):
    weights = jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.float32)
    stacked = jaxvq.quantize_params({"w": weights}, jaxvq.Rule("w", KMeans(bits=2), stacked=1), key=key)["w"]
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    last, _ = jax.lax.scan(lambda x, layer: (matmul(x, layer), None), x, stacked)
    expected = x
    for weight in stacked.dequantize():
        expected = expected @ weight
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "transpose", "message"),
    [
        ((5, 7), False, r"`w` must be \[a, b\] for `x` of shape .* = \(5, 7\), got \(24, 6\)"),
        ((5, 24), True, r"`w` must be \[b, a\]"),
    ],
)
def test_matmul_of_shapes_that_do_not_fit(shape, transpose, message):
    with pytest.raises(ValueError, match=message):
        matmul(jnp.ones(shape), DECODERS["palette per tensor"], transpose=transpose)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("out_axis", [0, 1])
def test_take(method, out_axis, rng, key):
    weight = jnp.asarray(rng.normal(size=(40, 24)), jnp.float32)
    layout = method.layout(weight.shape, weight.dtype, out_axis=out_axis)
    table = method.fit(weight, layout, key=key)
    ids = jnp.array([[0, 39, 7], [7, -1, -40]])
    rows = jax.jit(take)(table, ids)
    np.testing.assert_array_equal(rows, jnp.take(table.dequantize(), ids, axis=0))
    np.testing.assert_array_equal(take(table.dequantize(), ids), rows)


def test_take_beyond_the_table(rng, key):
    table = jaxvq.quantize_params(
        {"embedding": jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)}, KMeans(bits=2, per="channel"), key=key
    )["embedding"]
    rows = take(table, jnp.array([3, 40, -41]))
    assert np.all(np.isfinite(rows[0]))
    assert np.all(np.isnan(rows[1:]))


@pytest.mark.parametrize(
    "method", [KMeans(bits=2, per="channel"), Product(bits=3, dim=4), RowVQ(fraction=0.2)], ids=str
)
def test_gradient_of_take_reaches_the_codebook(method, rng, key):
    table = jaxvq.quantize_params({"embedding": jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)}, method, key=key)[
        "embedding"
    ]
    trainable, frozen = partition(table)
    ids = jnp.array([3, 3, 12])
    ours = jax.grad(lambda t: jnp.sum(take(jaxvq.combine(t, frozen), ids) ** 3))(trainable)
    whole = jax.grad(lambda t: jnp.sum(jaxvq.combine(t, frozen).dequantize()[ids] ** 3))(trainable)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_take_decodes_only_the_rows_that_it_takes(key):
    table = jaxvq.quantize_params({"embedding": jnp.arange(2000.0 * 16).reshape(2000, 16)}, KMeans(bits=4), key=key)[
        "embedding"
    ]
    lowered = jax.jit(take).lower(table, jnp.array([1, 2, 3])).as_text()
    assert "2000x16xf32" not in lowered
    assert "16x2000x" not in lowered


def test_take_from_no_matrix(unchecked):
    with pytest.raises(ValueError, match=r"`table` must be \[n, features\], got shape \(2, 3, 4\)"):
        take(jnp.ones((2, 3, 4)), jnp.array([0]))


@pytest.mark.parametrize("method", [KMeans(bits=3, per="channel"), Product(bits=3, dim=9)], ids=str)
def test_convolutions(method, rng, key):
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)
    quantized = jaxvq.quantize_params({"kernel": kernel}, method, key=key)["kernel"]
    images = jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32)
    names = ("NHWC", "HWIO", "NHWC")
    np.testing.assert_array_equal(
        conv(images, quantized, (2, 2), "SAME", dimension_numbers=names),
        jax.lax.conv_general_dilated(images, quantized.dequantize(), (2, 2), "SAME", dimension_numbers=names),
    )
    np.testing.assert_array_equal(
        conv_transpose(images, quantized, (2, 2), "SAME"),
        jax.lax.conv_transpose(images, quantized.dequantize(), (2, 2), "SAME"),
    )
    assert conv(images.astype(jnp.bfloat16), quantized, (1, 1), "SAME", dimension_numbers=names).dtype == jnp.bfloat16
