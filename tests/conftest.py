"""Settings for every test: strict promotion of dtypes in the core, one thread of figures, explicit seeds."""

import jax
import numpy as np
import pytest


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
