"""What calibration learns about a weight: how much each of its values matters."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

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

    def add(self, importance: Shaped[ArrayLike, "..."] | Sequence[Any]) -> "LayerStats":
        """Adds one observation, in a shape that broadcasts to the weight's: `gradient**2`, or `mean(x**2)[:, None]`.

        Raises:
          ValueError: for a shape that does not broadcast to the weight's.
        """
        seen, shape = jnp.asarray(importance, jnp.float32), self.total.shape
        fits = seen.ndim <= len(shape) and all(
            have in (1, want) for have, want in zip(seen.shape[::-1], shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"`importance` must broadcast to the weight's shape {shape}, got {seen.shape}; "
                "pass one value per weight, or axes of length 1 where all have the same"
            )
        return LayerStats(total=self.total + seen, count=self.count + 1)

    @property
    def importance(self) -> Float[Array, "..."]:
        """The mean importance of each value of the weight."""
        return safe_divide(self.total, self.count)
