"""The reshape between weights and vectors, against index arithmetic in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvq.layout import Layout


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    axis=st.integers(0, 3),
    dim=st.integers(1, 5),
    group=st.integers(1, 4),
    channels_last=st.booleans(),
    along_out=st.booleans(),
)
def test_round_trip_of_any_shape(shape, axis, dim, group, channels_last, along_out):
    out_axis = None if axis == len(shape) else axis % len(shape)
    layout = Layout.of(
        shape, "float32", out_axis=out_axis, channels_last=channels_last, dim=dim, group=group, along_out=along_out
    )
    weight = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    vectors = layout.to_vectors(jnp.asarray(weight))
    assert vectors.shape == (*layout.grid, dim)
    assert vectors.size == layout.size + layout.pad * layout.matrix_shape[0 if along_out else 1]
    assert np.count_nonzero(vectors) == weight.size
    np.testing.assert_array_equal(layout.from_vectors(vectors), weight)
    cut = layout.grid[1] * dim if along_out else layout.grid[0] * dim
    assert cut % dim == 0
    assert cut % group == 0


def test_flax_filter_is_one_vector():
    weight = np.random.default_rng(0).normal(size=(3, 3, 5, 7)).astype(np.float32)
    vectors = Layout.of(weight.shape, "float32", dim=9).to_vectors(jnp.asarray(weight))
    np.testing.assert_array_equal(vectors[4, 6], weight[:, :, 4, 6].reshape(9))


def test_torch_filter_is_one_vector():
    weight = np.random.default_rng(0).normal(size=(7, 5, 3, 3)).astype(np.float32)
    vectors = Layout.of(weight.shape, "float32", out_axis=0, channels_last=False, dim=9).to_vectors(jnp.asarray(weight))
    np.testing.assert_array_equal(vectors[4, 6], weight[6, 4].reshape(9))


def test_transposed_convolutions():
    flax = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)  # width, out, in
    layout = Layout.of(flax.shape, "float32", out_axis=1, dim=4)
    np.testing.assert_array_equal(layout.to_vectors(jnp.asarray(flax))[2, 1], flax[:, 1, 2])
    torch = flax.transpose(2, 1, 0)  # in, out, width
    layout = Layout.of(torch.shape, "float32", out_axis=1, channels_last=False, dim=4)
    np.testing.assert_array_equal(layout.to_vectors(jnp.asarray(torch))[2, 1], torch[2, 1])


def test_dense_vectors_lie_along_the_input():
    weight = np.arange(12, dtype=np.float32).reshape(6, 2)
    vectors = Layout.of((6, 2), "float32", dim=4).to_vectors(jnp.asarray(weight))
    np.testing.assert_array_equal(vectors[0, 1], [1, 3, 5, 7])
    np.testing.assert_array_equal(vectors[1, 1], [9, 11, 0, 0])


def test_vectors_along_the_output():
    weight = np.arange(12, dtype=np.float32).reshape(2, 6)
    vectors = Layout.of((2, 6), "float32", dim=4, along_out=True).to_vectors(jnp.asarray(weight))
    np.testing.assert_array_equal(vectors[1, 0], [6, 7, 8, 9])
    np.testing.assert_array_equal(vectors[1, 1], [10, 11, 0, 0])


def test_dtype_is_restored():
    layout = Layout.of((4, 2), "bfloat16", dim=2)
    assert layout.from_vectors(jnp.ones((2, 2, 2))).dtype == "bfloat16"


@pytest.mark.parametrize("axis", [2, -3])
def test_missing_axis(axis):
    with pytest.raises(ValueError, match=rf"`out_axis` must name one of the 2 axes of shape \(4, 2\), got {axis}"):
        Layout.of((4, 2), "float32", out_axis=axis)


def test_dim_below_one():
    with pytest.raises(ValueError, match="`dim` and `group` must be at least 1, got 0 and 1"):
        Layout.of((4, 2), "float32", dim=0)
