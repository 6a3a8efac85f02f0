"""What calibration learns about a weight: how much each of its values matters."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvq._numerics import safe_divide
from jaxvq._pytree import pytree_dataclass


@pytree_dataclass
class LayerStats:
    """Running sums of per-weight importance, such as squared gradients (the diagonal of the Fisher information).

    Sensitivity-weighted clustering follows Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", 2023,
    arXiv 2306.07629.

    Attributes:
      total: the sum of what was seen, in the shape of the weight, float32.
      count: how many times something was added.

    Example:
      >>> stats = LayerStats.zeros((2, 2)).add(jnp.ones((2, 2))).add(3 * jnp.ones((2, 2)))
      >>> float(stats.importance[0, 0])
      2.0
    """

    total: Float[Array, "..."]
    count: Float[Array, ""]

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "LayerStats":
        """Nothing seen yet of a weight of `shape`."""
        return cls(total=jnp.zeros(shape, jnp.float32), count=jnp.zeros((), jnp.float32))

    def add(self, importance: Float[Array, "..."]) -> "LayerStats":
        """Adds one observation, in a shape that broadcasts to the weight's: `gradient**2`, or `mean(x**2)[:, None]`."""
        return LayerStats(total=self.total + importance.astype(jnp.float32), count=self.count + 1)

    @property
    def importance(self) -> Float[Array, "..."]:
        """The mean importance of each value of the weight."""
        return safe_divide(self.total, self.count)
