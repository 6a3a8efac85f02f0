"""Dataclasses that JAX can walk, and names for the leaves of a tree."""

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """Declares a dataclass field that is part of the tree's structure, not a leaf of it.

    Its value must be hashable, because JAX compares it to find a compiled program again.
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and a pytree node, its fields the children.

    Unflattening does not run `__init__`: inside a transformation the children may be tracers, shapes or
    bare `object()`s, none of which a check in `__init__` should see.
    """
    data_cls: Any = dataclasses.dataclass(frozen=True)(cls)
    every_field = dataclasses.fields(data_cls)
    leaves = tuple(field.name for field in every_field if not field.metadata.get("static"))
    statics = tuple(field.name for field in every_field if field.metadata.get("static"))

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children = tuple((GetAttrKey(name), getattr(node, name)) for name in leaves)
        return children, tuple(getattr(node, name) for name in statics)

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, name) for name in leaves), tuple(getattr(node, name) for name in statics)

    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Any:
        node: Any = object.__new__(data_cls)
        for name, value in (*zip(leaves, children, strict=True), *zip(statics, aux, strict=True)):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(data_cls, flatten_with_keys, unflatten, flatten)
    return data_cls


def key_name(key: Any) -> str:
    """The text of one step of a tree path: a dictionary key, an index or an attribute name."""
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
        case GetAttrKey():
            return key.name
        case _:
            return str(key)


def path_str(path: Sequence[Any]) -> str:
    """A leaf's path as one string, such as `"Dense_0/kernel"`.

    A last step `.value` is left out: it is the box that nnx variables and linen's partitioned
    parameters put around an array, not part of its name.
    """
    steps = list(path)
    if len(steps) > 1 and isinstance(steps[-1], GetAttrKey) and steps[-1].name == "value":
        steps.pop()
    return "/".join(key_name(step) for step in steps)


def path_key(key: jax.Array, path: str) -> jax.Array:
    """The random key of the leaf at `path`: adding another leaf to the tree does not change it."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
