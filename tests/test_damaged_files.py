"""Files that are damaged or lie: each is refused with one error that names file and place."""

import json
import math
import struct
import zlib

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import save_file
from storage_cases import palette

from jaxvq import storage
from jaxvq._container import MAX_HEADER_NBYTES
from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.storage import FileFormatError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small file: (its bytes, its tree)."""
    path = tmp_path_factory.mktemp("sound") / "x"
    tree = {"w": palette(bits=3, k=7), "b": jnp.arange(3.0), "n": [jnp.arange(2)]}
    storage.save(path, tree, metadata={"by": "me"})
    return path.read_bytes(), tree


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="hostile") as caught:
        storage.load(path)
    assert len(str(caught.value)) < 500
    return str(caught.value)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bits_are_noticed(tmp_path, sound, data):
    damaged = bytearray(sound[0])
    for at in data.draw(st.sets(st.integers(0, 8 * len(damaged) - 1), min_size=1, max_size=3)):
        damaged[at // 8] ^= 1 << at % 8
    refused(tmp_path / "hostile", damaged)


def test_each_flipped_bit_of_the_header_is_noticed(tmp_path, sound):
    length = 8 + int.from_bytes(sound[0][:8], "little")
    for at in range(0, 8 * length, 19):
        damaged = bytearray(sound[0])
        damaged[at // 8] ^= 1 << at % 8
        refused(tmp_path / "hostile", damaged)


def test_each_truncation_is_noticed(tmp_path, sound):
    for length in range(0, len(sound[0]), 5):
        refused(tmp_path / "hostile", sound[0][:length])


def test_each_extension_is_noticed(tmp_path, sound):
    refused(tmp_path / "hostile", sound[0] + b"\0")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path, data):
    refused(tmp_path / "hostile", data)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{}",
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"a":1}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,5]}}',
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 9999 + b'1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":[],"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"format":1},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"format":"jaxvq","version":"1"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"format":"jaxvq"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\xff\xfe{}",
    ],
)
def test_hostile_headers(tmp_path, header):
    refused(tmp_path / "hostile", struct.pack("<Q", len(header)) + header + bytes(4))


def test_oversized_header_lengths(tmp_path):
    for length in (2**63, 2**64 - 1, MAX_HEADER_NBYTES + 1, 17):
        message = refused(tmp_path / "hostile", struct.pack("<Q", length) + b"{}" + bytes(8))
        assert "header" in message


def test_foreign_and_later_files(tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "hostile", metadata={"format": "pt"})
    assert "not a jaxvq file; `jaxvq quantize` makes one" in refused_file(tmp_path / "hostile")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "hostile", metadata={"format": "jaxvq", "version": "2"})
    assert "`version` is 2, later than 1; upgrade jaxvq" in refused_file(tmp_path / "hostile")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "hostile", metadata={"format": "jaxvq", "version": "one"})
    assert "`version` must be 1, got 'one'" in refused_file(tmp_path / "hostile")


def refused_file(path):
    return refused(path, path.read_bytes())


# Files with right checksums that lie: forged by the library's own writer.


def forge(path, change, tree=None):
    """Writes a tree whose description went through `change`."""
    tree = {"w": palette(bits=3, k=7)} if tree is None else tree

    real = storage.json.dumps

    def dumps(value, **kwargs):
        if isinstance(value, list):
            value = change(value) or value
        return real(value, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.json, "dumps", dumps)
        storage.save(path, tree, force=True)
    return refused_file(path)


def setting(field, value, inside=None):
    def change(leaves):
        target = leaves[0]["quantized"]
        (target if inside is None else target[inside])[field] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (setting("bits", 0), "`w` field `bits` must be a number from 1 to 16"),
        (setting("bits", "3"), "`w` field `bits`"),
        (setting("bits", True), "`w` field `bits`"),
        (setting("bits", 9), "`w#codes` must have shape"),
        (setting("axis", 2), "`w` field `axis`"),
        (setting("axis", 1), "`w` field `length`"),
        (setting("length", 9), "`w` field `length` must be a number from 10 to 10, got '9'"),
        (setting("stack", [1]), "`w#codes` does not fit the leaf"),
        (setting("stack", None), "`w` field `stack`"),
        (setting("decoder", "lattice"), "`w` field `decoder` must be one of"),
        (setting("decoder", "affine"), "`w#scale` is described but not stored"),
        (setting("layout", []), "`w` field `layout`"),
        (setting("shape", [2**40, 2**40], "layout"), "`w` field `length`"),
        (setting("shape", [10, -6], "layout"), "`w` field `shape`"),
        (setting("dtype", "int8", "layout"), "`w` field `dtype` must be a floating-point dtype"),
        (setting("dtype", ["float32"], "layout"), "`w` field `dtype`"),
        (setting("out_axis", 2, "layout"), "`w` field `out_axis`"),
        (setting("in_axis", 1, "layout"), "`w` field `in_axis` must be another axis than out_axis"),
        (setting("dim", 0, "layout"), "`w` field `dim`"),
        (setting("dim", 5, "layout"), "`w` field `length`"),
        (setting("dim", 3, "layout"), "`w` field `pad` must be what makes whole vectors of 3"),
        (setting("pad", 1, "layout"), "`w` field `length`"),
        (setting("along_out", 1, "layout"), "`w` field `along_out`"),
        (lambda leaves: leaves[0].update(keys=[[]]), "`w` field `keys`"),
        (lambda leaves: leaves[0].update(keys=[1]), "`keys` must number a list from 0"),
        (lambda leaves: leaves[0].update(keys=[{"key": "x"}]), "`w` field `keys`"),
        (lambda leaves: leaves[0].update(name=3), "the leaves must be objects with a `name`"),
        (lambda leaves: leaves[0].update(name="v"), "`v#codes` is described but not stored"),
        (lambda leaves: leaves[0].update(empty="set"), "`w` field `empty`"),
        (lambda leaves: leaves[0].update(empty=["none"]), "`w` field `empty`"),
        (lambda leaves: leaves.pop() and [], "`leaves` do not account for each tensor once"),
        (lambda leaves: leaves * 2, "`leaves` do not account for each tensor once"),
        (lambda leaves: leaves[0].pop("quantized") and None, "`w` is described but not stored"),
        (lambda leaves: [*leaves, {"name": "e", "keys": ["w"], "empty": "none"}], "`keys` are those of another leaf"),
        (
            lambda leaves: [*leaves, {"name": "e", "keys": ["w", 0], "empty": "none"}],
            "`keys` lead through another leaf",
        ),
        (lambda leaves: ["x"], "the leaves must be objects"),
    ],
)
def test_lying_descriptions(tmp_path, change, match):
    assert match in forge(tmp_path / "hostile", change)


def test_a_code_beyond_the_codebook(tmp_path):
    array = palette(bits=3, k=8)
    fewer = QuantizedArray(array.codes, Codebook(array.decoder.vectors[..., :5, :]), array.layout)
    storage.save(tmp_path / "hostile", {"net": {"w": fewer}})
    assert "`net/w#codes` must be below the 5 entries of the decoder, got 7" in refused_file(tmp_path / "hostile")
    symmetric = QuantizedArray(array.codes, Affine(jnp.ones((1, 1, 1))), array.layout)
    storage.save(tmp_path / "hostile", {"w": symmetric}, force=True)
    assert "`w#codes` must be below the 7 entries of the decoder, got 7" in refused_file(tmp_path / "hostile")


@pytest.mark.parametrize(
    ("decoder", "match"),
    [
        (lambda: Codebook(jnp.ones((3, 1, 1, 8, 1))), r"`w` decoder: `vectors` must have first axes that divide"),
        (lambda: Codebook(jnp.ones((1, 1, 2, 8, 1))), r"`w` decoder: `vectors` must be .* m=1"),
        (lambda: Codebook(jnp.ones((1, 1, 1, 8, 2))), r"`w` decoder: `vectors` must be .* d=1"),
        (lambda: Codebook(jnp.ones((1, 1, 1, 0, 1))), "`w#vectors` does not fit the leaf"),
        (lambda: Codebook(jnp.ones((1, 1, 1, 8, 1)), jnp.ones((1, 1, 3, 1, 1))), "`w` decoder: `scale` must have 1"),
        (lambda: Affine(jnp.ones((4, 1, 1))), "`w` decoder: `scale` must have first axes that divide"),
    ],
)
def test_decoders_of_another_layout(tmp_path, decoder, match):
    array = palette(bits=3, k=7)
    storage.save(tmp_path / "hostile", {"w": QuantizedArray(array.codes, decoder(), array.layout)})
    with pytest.raises(FileFormatError, match=match):
        storage.load(tmp_path / "hostile")


def test_dtypes_that_jax_would_narrow(tmp_path):
    storage.save(tmp_path / "hostile", {"w": palette(k=7)})
    with open(tmp_path / "hostile", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    codes_nbytes = 4 * math.prod(header["w#codes"]["shape"])
    header["w#vectors"] |= {"dtype": "F64", "data_offsets": [0, 56]}
    header["w#codes"]["data_offsets"] = [56, 56 + codes_nbytes]
    header["#crc32"]["data_offsets"] = [56 + codes_nbytes, 68 + codes_nbytes]
    text = json.dumps(header).encode()
    start, vectors, codes = struct.pack("<Q", len(text)) + text, bytes(56), bytes(codes_nbytes)
    checksums = struct.pack("<3I", *map(zlib.crc32, (start, vectors, codes)))
    (tmp_path / "hostile").write_bytes(start + vectors + codes + checksums)
    assert "`w#vectors` has 64 bits; set jax_enable_x64" in refused_file(tmp_path / "hostile")


def test_dtypes_of_less_than_a_byte_are_listed_but_not_read(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(3))
    with storage.CheckpointReader(tmp_path / "x") as reader:
        assert list(reader.leaves) == ["a"]
        with pytest.raises(ValueError, match="a: dtype F4 packs several values in a byte"):
            reader.templates()
