"""Rows of a quantized table, such as the embeddings of some tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Shaped

from jaxvq.array import QuantizedArray


def take(
    table: QuantizedArray | Shaped[Array, "n features"], ids: Integer[Array, "*ids"]
) -> Shaped[Array, "*ids features"]:
    """The rows `ids` of a table `[n, features]`; of a quantized one, only those rows are decoded.

    Like `jnp.take`: a negative id counts from the end, one out of range gives a row of NaN. Differentiable in the
    decoder.

    Raises:
      ValueError: for a table that is no matrix.

    Example:
      >>> import jaxvq
      >>> table = {"embedding": jax.random.normal(jax.random.key(0), (1000, 64))}
      >>> table = jaxvq.quantize_params(table, jaxvq.Product(bits=6, dim=4), key=jax.random.key(1))
      >>> take(table["embedding"], jnp.array([3, 14])).shape
      (2, 64)
    """
    if len(table.shape) != 2:
        raise ValueError(f"`table` must be [n, features], got shape {table.shape}; stacked tables go through jax.vmap")
    if not isinstance(table, QuantizedArray):
        return jnp.take(table, ids, axis=0)
    layout = table.layout
    if layout.out_axis != 0 or layout.along_out or table.codes.axis != 0:
        return jnp.take(table.dequantize(), ids, axis=0)
    rows, features = layout.shape
    flat = ids.reshape(-1)
    index = jnp.clip(jnp.where(flat < 0, flat + rows, flat), 0, rows - 1)

    def of_rows(leaf: Shaped[Array, "_ out_blocks *rest"]) -> Shaped[Array, "..."]:
        blocks = leaf.shape[1]
        return leaf if blocks == 1 else leaf[:, index // (rows // blocks)]

    codes = dataclasses.replace(table.codes, words=table.codes.words[:, index])
    some = dataclasses.replace(layout, shape=(flat.size, features))
    taken = QuantizedArray(codes, jax.tree.map(of_rows, table.decoder), some).dequantize()
    known = (flat >= -rows) & (flat < rows)
    return jnp.where(known[:, None], taken, jnp.nan).astype(taken.dtype).reshape(*ids.shape, features)
