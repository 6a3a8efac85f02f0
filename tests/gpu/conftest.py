"""Without a GPU, kernels of products are interpreted: slower, and stricter about memory."""

import jax
import pytest

from jaxvq.ops import cuda
from tests.ops import interpreted


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    if jax.default_backend() == "gpu" or cuda.compiler() is None:
        yield
        return
    with monkeypatch.context() as patch:
        interpreted.interpret(patch)
        yield
    interpreted.forget()
