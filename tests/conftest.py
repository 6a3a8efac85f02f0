"""What the tests share: explicit seeds, and a compiler that is quick rather than thorough."""

import os

import jax
import jaxtyping
import numpy as np
import pytest

# Most of the time of the tests goes into compiling small programs. This leaves out the optimization of machine code,
# not that of the programs; the flags are read when the first array is made.
# Two devices, so that what is spread over several can be tested.
flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def unchecked():
    """Without the type-checking hook, whose complaint about an annotation would come before the message."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
