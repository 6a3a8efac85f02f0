import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import format_reader
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from make_golden import packed
from safetensors import safe_open
from safetensors.numpy import save_file
from storage_cases import dequantize, palette, same, same_tree, small_tree

from jaxvq import _container, storage
from jaxvq._container import Reader, checksums_nbytes
from jaxvq._leaves import flatten
from jaxvq._pytree import pytree_dataclass
from jaxvq.array import Codebook, QuantizedArray
from jaxvq.layout import Layout

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / make_golden.NAME
DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
DTYPES += ["float16", "bfloat16", "float32", "float64", "complex64"]
DTYPES += ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]


# -- round trips


def test_round_trip_of_a_tree(tmp_path):
    tree = small_tree()
    storage.save(tmp_path / "x", tree, metadata={"by": "me"})
    loaded = storage.load(tmp_path / "x")
    assert same_tree(loaded, tree)
    assert isinstance(loaded["a"]["w"], QuantizedArray)
    assert loaded["a"]["w"].layout == tree["a"]["w"].layout
    assert same(dequantize(loaded["a"]["w"]), dequantize(tree["a"]["w"]))
    assert sorted(os.listdir(tmp_path)) == ["x"]
    with storage.CheckpointReader(tmp_path / "x") as reader:
        assert reader.metadata == {"by": "me"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_every_dtype(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    tree = {"plain": array, "transposed": array.T, "scalar": array[1, 2], "none": array[:0]}
    storage.save(tmp_path / "x", tree)
    loaded = storage.load(tmp_path / "x")
    assert loaded.keys() == tree.keys()
    assert all(same(loaded[name], tree[name]) for name in tree)


def test_big_endian_arrays_keep_their_values(tmp_path):
    storage.save(tmp_path / "x", {"a": np.arange(3, dtype=">f4")})
    np.testing.assert_array_equal(storage.load(tmp_path / "x")["a"], [0, 1, 2])


@pytest.mark.parametrize("tree", [jnp.ones(2), [], {}, None, [[jnp.ones(1)], [None]], {"": {"": jnp.ones(1)}}])
def test_round_trip_of_odd_trees(tmp_path, tree):
    storage.save(tmp_path / "x", tree)
    assert same_tree(storage.load(tmp_path / "x"), tree)


def test_number_keys_are_not_indices(tmp_path):
    tree = {"layers": {0: jnp.ones(1), 1: jnp.ones(2)}, "list": [jnp.ones(1)]}
    storage.save(tmp_path / "x", tree)
    assert same_tree(storage.load(tmp_path / "x"), tree)


class Dense(NamedTuple):
    kernel: Any
    bias: Any


@pytree_dataclass
class Box:
    """Like the variables of flax.nnx: the last step of the path, `.value`, is no name."""

    value: Any


def test_attributes_come_back_as_dictionary_keys(tmp_path):
    tree = {"layer": Dense(palette(), Box(jnp.ones(2)))}
    storage.save(tmp_path / "x", tree)
    assert same_tree(storage.load(tmp_path / "x"), {"layer": {"kernel": palette(), "bias": jnp.ones(2)}})
    assert same_tree(storage.load(tmp_path / "x", like=tree), tree)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 16), st.integers(1, 4), st.booleans(), st.data()
)
def test_a_reader_of_the_format_document_agrees(tmp_path, shape, bits, dim, along_out, data):
    layout = Layout.of(
        tuple(shape),
        data.draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        out_axis=data.draw(st.sampled_from([None, *range(len(shape))])),
        channels_last=data.draw(st.booleans()),
        dim=dim,
        along_out=along_out,
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    k = min(2**bits, 40)
    codes = packed(rng.integers(0, k, (*layout.grid, 2)), bits, axis=data.draw(st.integers(0, 1)))
    vectors = jnp.asarray(rng.integers(-99, 99, (layout.grid[0], 1, 2, k, dim)) / 8, jnp.float32)
    array = QuantizedArray(codes, Codebook(vectors), layout)
    storage.save(tmp_path / "x", {"w": array}, force=True)
    expected = dequantize(array)
    assert same(format_reader.read_weights(tmp_path / "x")["w"], expected)
    assert same(dequantize(storage.load(tmp_path / "x")["w"]), expected)


def test_the_safetensors_library_reads_the_file(tmp_path):
    tree = small_tree()
    storage.save(tmp_path / "x", {"a": tree["a"]})
    with safe_open(tmp_path / "x", "numpy") as file:
        assert set(file.keys()) == {"a/b", "a/w#codes", "a/w#vectors", "#crc32"}
        assert same(file.get_tensor("a/w#codes"), tree["a"]["w"].codes.words)
        assert file.metadata()["format"] == "jaxvq"


def test_tensors_are_aligned_to_their_dtype(tmp_path):
    tree = {"a": np.ones(3, np.int8), "b": np.ones(1, np.float64), "c": np.ones(1, np.float16), "d": np.ones(1, "f4")}
    storage.save(tmp_path / "x", tree)
    with Reader(tmp_path / "x") as reader:
        assert all((reader.header_nbytes + t.start) % t.dtype.itemsize == 0 for t in reader.tensors.values())


def test_the_file_is_its_header_its_arrays_and_the_checksums(tmp_path):
    tree = small_tree()
    storage.save(tmp_path / "x", tree)
    arrays = jax.tree.leaves(tree)
    with storage.CheckpointReader(tmp_path / "x") as reader:
        data = reader.file_nbytes - reader.header_nbytes
    assert data == sum(a.nbytes for a in arrays) + checksums_nbytes(len(arrays))


# -- the file of version 1


def test_golden_file_loads():
    expected = np.load(DATA / "golden_v1.npz")
    leaves = {leaf.name: leaf.value for leaf in flatten(storage.load(GOLDEN)) if leaf.parts()}
    assert set(leaves) == set(expected)
    for name, leaf in leaves.items():
        value = dequantize(leaf) if isinstance(leaf, QuantizedArray) else leaf
        assert same(np.asarray(value).astype(expected[name].dtype), expected[name]), name


def test_golden_file_reads_by_its_document():
    expected = np.load(DATA / "golden_v1.npz")
    weights = format_reader.read_weights(GOLDEN)
    assert set(weights) == set(expected)
    for name, value in weights.items():
        assert same(value.astype(expected[name].dtype), expected[name]), name


def test_golden_file_is_what_is_written_today(tmp_path):
    make_golden.make(tmp_path)
    assert (tmp_path / make_golden.NAME).read_bytes() == GOLDEN.read_bytes()


# -- `like`


def test_like_fills_the_template(tmp_path):
    tree = (small_tree()["a"], jnp.arange(2))
    storage.save(tmp_path / "x", tree)
    structs = ({"b": jax.ShapeDtypeStruct((3,), jnp.float32), "w": np.zeros((10, 6), np.float32)}, tree[1])
    assert same_tree(storage.load(tmp_path / "x", like=structs), tree)
    assert same_tree(storage.load(tmp_path / "x", like=tree), tree)


def test_like_must_match(tmp_path):
    storage.save(tmp_path / "x", {"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="`like` has leaves that the file lacks: c"):
        storage.load(tmp_path / "x", like={"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(3)})
    with pytest.raises(ValueError, match="`like` lacks leaves of the file: b"):
        storage.load(tmp_path / "x", like={"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"b is float32 \(3,\), got float32 \(4,\)"):
        storage.load(tmp_path / "x", like={"a": jnp.ones(2), "b": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"b is float32 \(3,\), got bfloat16"):
        storage.load(tmp_path / "x", like={"a": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16)})


# -- what cannot be saved


@pytest.mark.parametrize(
    ("tree", "error", "match"),
    [
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, ValueError, "a/b: two leaves have this path"),
        ({"w#codes": jnp.ones(1), "w": palette()}, ValueError, "w#codes: two leaves need this tensor name"),
        ({"#crc32": jnp.ones(1)}, ValueError, "#crc32: two leaves need"),
        ({"__metadata__": jnp.ones(1)}, ValueError, "__metadata__: .* reserved"),
        ({"a": 1.5}, TypeError, "a: a leaf must be an array, got float"),
        ({"a": jnp.ones(2, jnp.int4)}, TypeError, "a: safetensors has no dtype int4"),
        ({"a": jax.random.key(0)}, TypeError, "a: a leaf must hold numbers, got dtype key"),
        ({("a", "b"): jnp.ones(1)}, TypeError, "dictionary keys must be texts or whole numbers"),
        ({True: jnp.ones(1)}, TypeError, "dictionary keys must be texts or whole numbers"),
    ],
)
def test_trees_that_cannot_be_saved(tmp_path, tree, error, match):
    with pytest.raises(error, match=match):
        storage.save(tmp_path / "x", tree)
    assert os.listdir(tmp_path) == []


def test_too_deep_a_tree(tmp_path):
    tree = jnp.ones(1)
    for _ in range(101):
        tree = [tree]
    with pytest.raises(ValueError, match="may be 100 levels deep, got 101"):
        storage.save(tmp_path / "x", tree)


def test_metadata_is_text(tmp_path):
    with pytest.raises(TypeError, match="metadata"):
        storage.save(tmp_path / "x", {}, metadata={"epoch": 3})


def test_existing_file_needs_force(tmp_path):
    storage.save(tmp_path / "x", {"a": jnp.ones(1)})
    with pytest.raises(FileExistsError, match=r"x: exists already; .*--force"):
        storage.save(tmp_path / "x", {"a": jnp.zeros(1)})
    storage.save(tmp_path / "x", {"a": jnp.zeros(1)}, force=True)
    assert storage.load(tmp_path / "x")["a"] == 0


def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
        storage.save(tmp_path / "missing" / "x", {})
    with pytest.raises(FileExistsError, match="is a folder"):
        storage.save(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="y: no such file"):
        storage.load(tmp_path / "y")
    with pytest.raises(FileNotFoundError, match="not a file"):
        storage.load(tmp_path)


# -- interrupted writing


def write_some(path, values, stop_after, token="t", error=KeyboardInterrupt):
    """Writes leaves until `error` after `stop_after` of them; returns the names written."""
    written = []
    with storage.CheckpointWriter(path, values, token=token, metadata={"k": "v"}) as writer:
        for leaf in flatten(values):
            if writer.done(leaf.name):
                continue
            if len(written) == stop_after:
                raise error
            writer.write(leaf.name, leaf.value)
            written.append(leaf.name)
    return written


def interrupted(path, values, stop_after, **kwargs):
    with pytest.raises(kwargs.get("error", KeyboardInterrupt)):
        write_some(path, values, stop_after, **kwargs)


VALUES = {"a": palette(), "b": jnp.arange(5.0), "c": palette(seed=1), "d": jnp.zeros((0, 3)), "e": jnp.zeros(3)}


def test_an_interrupt_keeps_what_is_done(tmp_path):
    interrupted(tmp_path / "x", VALUES, 2)
    assert os.listdir(tmp_path) == ["x.partial"]
    assert write_some(tmp_path / "x", VALUES, None) == ["c", "e"]
    assert os.listdir(tmp_path) == ["x"]
    assert same_tree(storage.load(tmp_path / "x"), VALUES)
    storage.save(tmp_path / "y", VALUES, metadata={"k": "v"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_damaged_leaf_of_a_partial_file_is_written_again(tmp_path):
    interrupted(tmp_path / "x", VALUES, 2)
    data = bytearray((tmp_path / "x.partial").read_bytes())
    at = bytes(data).index(np.asarray(VALUES["b"]).tobytes())
    data[at + 3] ^= 16
    (tmp_path / "x.partial").write_bytes(data)
    assert write_some(tmp_path / "x", VALUES, None) == ["b", "c", "e"]
    assert same_tree(storage.load(tmp_path / "x"), VALUES)


def test_another_source_starts_afresh(tmp_path):
    interrupted(tmp_path / "x", VALUES, 2)
    assert write_some(tmp_path / "x", VALUES, None, token="another") == ["a", "b", "c", "e"]
    assert same_tree(storage.load(tmp_path / "x"), VALUES)


def test_another_tree_starts_afresh(tmp_path):
    interrupted(tmp_path / "x", VALUES, 2)
    other = {**VALUES, "c": palette(bits=4)}
    assert write_some(tmp_path / "x", other, None) == ["a", "b", "c", "e"]
    assert same_tree(storage.load(tmp_path / "x"), other)


def test_a_stray_partial_file_starts_afresh(tmp_path):
    (tmp_path / "x.partial").write_bytes(b"anything")
    assert write_some(tmp_path / "x", VALUES, None) == ["a", "b", "c", "e"]
    assert same_tree(storage.load(tmp_path / "x"), VALUES)


def test_an_error_leaves_nothing(tmp_path):
    interrupted(tmp_path / "x", VALUES, 2, error=ValueError)
    interrupted(tmp_path / "x", VALUES, 2, token=None)
    assert os.listdir(tmp_path) == []


def test_two_runs_at_once(tmp_path):
    with (
        storage.CheckpointWriter(tmp_path / "x", {}),
        pytest.raises(FileExistsError, match=r"x.partial: another run is writing this file"),
    ):
        storage.save(tmp_path / "x", {})
    assert os.listdir(tmp_path) == ["x"]


# -- one leaf at a time


def test_foreign_files_are_read_leaf_by_leaf(tmp_path):
    arrays = {"b.weight": np.arange(6, dtype=np.float16).reshape(2, 3), "a.bias": np.ones(3, np.float64)}
    save_file(arrays, tmp_path / "x", metadata={"format": "pt"})
    with storage.CheckpointReader(tmp_path / "x") as reader:
        assert (reader.is_jaxvq, reader.metadata) == (False, {"format": "pt"})
        assert {name: (t.shape, t.dtype) for name, t in reader.templates().items()} == {
            name: (a.shape, a.dtype) for name, a in arrays.items()
        }
        assert all(same(reader.read(name), a) for name, a in arrays.items())


def test_stacked_layers_slice_after_loading(tmp_path):
    arrays = [palette(seed=1), palette(seed=2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    storage.save(tmp_path / "x", {"w": stacked})
    loaded = storage.load(tmp_path / "x")["w"]
    assert loaded.stack == (2,)
    assert same(dequantize(loaded)[1], dequantize(arrays[1]))


def test_golden_copy_is_independent_of_its_name(tmp_path):
    shutil.copy(GOLDEN, tmp_path / "other")
    assert same_tree(storage.load(tmp_path / "other"), storage.load(GOLDEN))


def test_random_keys_and_functions_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"rngs/key: a leaf must hold numbers, .* nnx\.state\(model, nnx\.Param\)"):
        storage.save(tmp_path / "x", {"rngs": {"key": jax.random.key(0)}})
    with pytest.raises(TypeError, match=r"act: a leaf must be an array, got .*equinox\.is_array"):
        storage.save(tmp_path / "x", {"act": len})
    assert not list(tmp_path.iterdir())


def test_arrays_are_taken_as_they_were_read():
    data = _container._aligned(4096)
    assert storage.to_jax(data.view(np.float32)).unsafe_buffer_pointer() == data.ctypes.data
