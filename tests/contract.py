"""Who takes part in the contract suites. A new method or decoder joins by adding one line."""

import jax
import jax.numpy as jnp

from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.bits import pack
from jaxvq.layout import Layout
from jaxvq.methods import KMeans, Product, Residual, RowVQ, Symmetric, Uniform
from jaxvq.training import QuantNoise, SoftAssignment, StraightThrough

METHODS = [
    Uniform(bits=4),
    Uniform(bits=1, per="channel"),
    Uniform(bits=3, per=16),
    Symmetric(bits=4),
    Symmetric(bits=1),
    Symmetric(bits=8, per="channel"),
    KMeans(bits=4),
    KMeans(k=13, per="channel"),
    KMeans(bits=2, per=16, codebook_dtype="int8"),
    RowVQ(fraction=0.4),
    Product(bits=3, dim=4),
    Product(k=5, dim=3, codebooks="subspace", codebook_dtype="bfloat16"),
    Residual(stages=2, bits=3, dim=4, codebook_dtype="int8"),
]

TRAININGS = [
    (StraightThrough(), Symmetric(bits=4)),
    (StraightThrough(), Symmetric(bits=1, per="channel")),
    (StraightThrough(), Uniform(bits=2, per=16)),
    (StraightThrough(learned_step=True), Symmetric(bits=3, per="channel")),
    (StraightThrough(learned_step=True), Symmetric(bits=1)),
    (SoftAssignment(temperature=1e-3), KMeans(bits=2)),
    (SoftAssignment(temperature=1e-2), KMeans(bits=3, per="channel", codebook_dtype="bfloat16")),
    (SoftAssignment(temperature=1e-2), KMeans(k=5, per=20)),
    (QuantNoise(rate=0.2), Product(bits=3, dim=4)),
    (QuantNoise(rate=0.2), RowVQ(fraction=0.4)),
    (QuantNoise(rate=0.5), Uniform(bits=4)),
    (QuantNoise(rate=1.0), Symmetric(bits=4)),
]


def random_array(decoder, *, bits: int, shape=(24, 6), dim: int = 1, stages: int = 1, entries: int) -> QuantizedArray:
    """Random valid codes under a decoder."""
    layout = Layout.of(shape, "float32", dim=dim)
    codes = jax.random.randint(jax.random.key(7), (*layout.grid, stages), 0, entries)
    return QuantizedArray(pack(codes, bits), decoder, layout)


def normal(*shape: int):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


DECODERS = {
    "affine per tensor": random_array(Affine(normal(1, 1, 1), normal(1, 1, 1)), bits=5, entries=32),
    "affine per channel": random_array(Affine(normal(1, 6, 1), normal(1, 6, 1)), bits=8, entries=256),
    "affine per group, symmetric": random_array(Affine(normal(3, 6, 1)), bits=4, entries=15),
    "affine at one bit": random_array(Affine(normal(1, 1, 1)), bits=1, entries=2),
    "palette per tensor": random_array(Codebook(normal(1, 1, 1, 13, 1)), bits=4, entries=13),
    "palette per channel": random_array(Codebook(normal(1, 6, 1, 4, 1)), bits=2, entries=4),
    "palette per group of rows": random_array(Codebook(normal(3, 2, 1, 8, 1)), bits=3, entries=8),
    "product, shared": random_array(Codebook(normal(1, 1, 1, 32, 4)), bits=5, dim=4, entries=32),
    "product, per subspace": random_array(Codebook(normal(6, 1, 1, 7, 4)), bits=3, dim=4, entries=7),
    "residual, int8": random_array(
        Codebook(jnp.arange(-64, 64, dtype=jnp.int8).reshape(1, 1, 2, 16, 4), normal(1, 1, 2, 1, 1)),
        bits=4,
        dim=4,
        stages=2,
        entries=16,
    ),
    "rows, bfloat16": random_array(Codebook(normal(1, 1, 1, 3, 24).astype("bfloat16")), bits=2, dim=24, entries=3),
}
