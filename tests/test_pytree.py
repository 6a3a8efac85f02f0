import jax
import jax.numpy as jnp
import numpy as np

from jaxvq._numerics import running_sum, safe_divide
from jaxvq._pytree import path_key, path_str, pytree_dataclass, static


@pytree_dataclass
class Pair:
    first: object
    second: object
    name: str = static(default="x")


def test_dataclass_is_a_tree_with_named_leaves():
    pair = Pair(jnp.ones(2), {"a": 3}, name="n")
    paths = [path_str(path) for path, _ in jax.tree.leaves_with_path(pair)]
    assert paths == ["first", "second/a"]
    doubled = jax.tree.map(lambda x: x * 2, pair)
    assert (doubled.second["a"], doubled.name) == (6, "n")


def test_boxes_are_not_part_of_a_name():
    class Box:
        pass

    jax.tree_util.register_pytree_with_keys(
        Box, lambda box: (((jax.tree_util.GetAttrKey("value"), 1),), None), lambda aux, children: Box()
    )
    tree = {"kernel": Box(), "list": [Box()], "value": 2}
    assert [path_str(path) for path, _ in jax.tree.leaves_with_path(tree)] == ["kernel", "list/0", "value"]


def test_keys_differ_by_path():
    key = jax.random.key(0)
    a, b = (jax.random.key_data(path_key(key, path)) for path in ("a", "b"))
    assert bool(jnp.any(a != b))
    assert bool(jnp.all(jax.random.key_data(path_key(key, "a")) == a))


def test_safe_divide():
    np.testing.assert_array_equal(safe_divide(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])), [0, 0.5])


def test_running_sum():
    for n in (1, 2, 255, 256, 257, 1000, 70_000):
        values = np.random.default_rng(n).integers(0, 9, (2, n))
        expected = np.concatenate([np.zeros((2, 1)), values.cumsum(axis=1)], axis=1)
        np.testing.assert_array_equal(running_sum(jnp.asarray(values, jnp.float32)), expected)
