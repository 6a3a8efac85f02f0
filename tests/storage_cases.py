"""Small quantized weights and trees for the tests of files."""

import jax
import jax.numpy as jnp
import numpy as np
from make_golden import packed

from jaxvq.array import Codebook, QuantizedArray
from jaxvq.layout import Layout


def palette(shape=(10, 6), bits=3, k=7, seed=0, **kwargs):
    layout = Layout.of(shape, "float32", **kwargs)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, k, (*layout.grid, 1))
    vectors = jnp.asarray(rng.normal(size=(1, 1, 1, k, layout.dim)), jnp.float32)
    return QuantizedArray(packed(codes, bits), Codebook(vectors), layout)


def small_tree():
    return {"a": {"w": palette(), "b": jnp.arange(3.0)}, "c": [jnp.ones((2, 2), jnp.bfloat16), None, {}]}


@jax.jit
def dequantize(array):
    """One compiled program is much faster to make than one for each operation."""
    return array.dequantize()


def same(a, b):
    """Bit for bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def same_tree(a, b):
    is_same = jax.tree.map(same, a, b, is_leaf=lambda x: x is None)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(is_same))
