"""Quantized parameters in one safetensors file.

Format, version 1
-----------------
The file is a valid safetensors file: 8 bytes with the header's length `N` (little endian), `N` bytes of JSON (padded
with spaces), then the tensors' bytes. All numbers are little endian, all arrays row-major. The tensors follow each
other without holes, the widest dtypes first.

`__metadata__` holds texts:

| key | value |
|---|---|
| `format` | `jaxvq` |
| `version` | `1`; a reader must refuse a later one |
| `leaves` | JSON: a list with one object for every leaf of the tree, in the tree's order |
| `metadata` | JSON: an object of texts, the user's own (absent when there are none) |

A leaf is `{"name": ..., "keys": [...]}` and at most one of `"quantized"` and `"empty"`. `name` is its path as text
(`"a/b"`). `keys` is its path in the tree: a text is a dictionary key, a whole number an index into a list,
`{"key": n}` a dictionary key that is a number. `"empty"` is `"none"`, `"dict"` or `"list"`: a leaf without tensors.
A leaf with neither is the tensor of that name, as it is.

`"quantized"` is an object:

| field | value |
|---|---|
| `decoder` | `affine` or `codebook` |
| `bits` | bits per code, 1 to 16 |
| `axis` | 0: codes are packed along `g`; 1: along `out` |
| `length` | codes along that axis |
| `stack` | sizes of the leading axes that stack layers (`[]`: none); every tensor below begins with them |
| `layout` | of one layer: `shape`, `dtype` (its name), `out_axis`, `in_axis` (or null), `dim`, `pad`, `along_out` |

and its tensors, `S` for the stacked axes and `w` for packed words:

| tensor | dtype | shape |
|---|---|---|
| `<name>#codes` | U32 | `[S, w, out, m]` (axis 0) or `[S, g, w, m]` (axis 1), `w = ceil(length * bits / 32)` |
| `<name>#vectors` (codebook) | float or I8 | `[S, g', out', m, k, dim]` |
| `<name>#scale` (codebook, optional) | float | `[S, g', out', m', 1, 1]`, `m'` is 1 or `m` |
| `<name>#scale` (affine) | float | `[S, g', out', 1]` |
| `<name>#zero_point` (affine, optional) | float | `[S, g', out', 1]` |

where each `g'` divides `g` and each `out'` divides `out`.

*Codes.* Along the packed axis the words are a stream of bits: bit `b` of the stream is bit `b % 32` of word
`b // 32`, bit 0 the lowest. Code `i` is the number in bits `i * bits` to `(i + 1) * bits - 1`, the lowest first. Bits
after the last code are zero.

*Values.* For each layer, `value[g, out, j]` with `j` from 0 to `dim - 1`, computed in float32. A block index is
`G = g * g' // |g|` with `|g|` the length of the axis, and `O = out * out' // |out|` likewise.

    affine     (code[g, out, 0] - zero_point[G, O, 0]) * scale[G, O, 0]
               without zero_point: 2**(bits - 1) - 1 in its place, or 0.5 at one bit
    codebook   sum over m, in order, of vectors[G, O, m, code[g, out, m], j] * scale[G, O, m, 0, 0]

Every code is below `k` (codebook), `2**bits` (affine) or `2**bits - 1` (affine without zero_point, over one bit).

*Weight.* Element `index` of a layer of shape `layout.shape` has the column `c = index[out_axis]` (0 when null) and the
row `r`: its row-major position over the other axes, `in_axis` first, then the rest in order. Its value is

    along_out false    value[r // dim, c, r % dim]           g = (rows + pad) / dim, out = columns
    along_out true     value[r, c // dim, c % dim]           g = rows, out = (columns + pad) / dim

rounded to `layout.dtype`.

*Checksums.* One more tensor, `#crc32`, is U32 `[1 + tensors]`: the CRC-32 (of zlib and PNG) of the file's first
`8 + N` bytes, then of each other tensor's bytes in the order of their offsets.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvq._container import CHECKSUMS, FileFormatError, Reader, Tensor, tensor_of
from jaxvq._hostcodes import iter_codes
from jaxvq._leaves import Leaf, fill, flatten, is_leaf, parse, parts, struct_of, unflatten
from jaxvq._writer import Writer
from jaxvq.array import QuantizedArray

__all__ = ["CheckpointReader", "CheckpointWriter", "FileFormatError", "load", "save"]

FORMAT = "jaxvq"
VERSION = 1


def save(
    path: str | os.PathLike[str], params: Any, *, metadata: Mapping[str, str] | None = None, force: bool = False
) -> None:
    """Writes a tree of arrays and quantized weights into one safetensors file.

    The file appears under its name only when it is complete. An array at two paths is written twice.

    Args:
      path: the file to make.
      params: any pytree whose leaves are arrays, QuantizedArrays or None.
      metadata: texts to keep with it.
      force: replace the file if it exists.

    Raises:
      FileExistsError: if the file exists, without `force`.
      FileNotFoundError: if its folder does not exist.
      TypeError: for a leaf that is no array or has a dtype that safetensors lacks.
      ValueError: for two leaves of the same path.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/model.safetensors", {"bias": np.ones(2, np.float32)})
      ...     load(f"{folder}/model.safetensors")
      {'bias': Array([1., 1.], dtype=float32)}
    """
    with CheckpointWriter(path, params, metadata=metadata, force=force) as writer:
        for leaf in flatten(params):
            writer.write(leaf.name, leaf.value)


def load(path: str | os.PathLike[str], *, like: Any = None) -> Any:
    """Reads what `save` or `jaxvq quantize` wrote.

    Args:
      path: the file.
      like: a tree of the structure to fill, its leaves of the right shapes and dtypes (`jax.ShapeDtypeStruct`s
        will do; what is quantized in the file may be a plain array here). None rebuilds dictionaries and lists;
        attributes and named fields come back as dictionaries, tuples as lists.

    Returns:
      The tree. Its arrays are JAX arrays, but numpy arrays where JAX would drop 64-bit precision.

    Raises:
      FileNotFoundError: if there is no such file.
      FileFormatError: (a ValueError) if it is damaged, foreign or of a later version; names file, leaf and field.
      ValueError: if `like` has other leaves.
    """
    with CheckpointReader(path) as reader:
        reader.require_jaxvq()
        leaves = [Leaf(leaf.name, leaf.keys, reader.read(leaf.name)) for leaf in reader.leaves.values()]
        if like is None:
            return unflatten(leaves, reader.container)
        return _fill_like(reader.path, like, {leaf.name: leaf.value for leaf in leaves})


class CheckpointReader:
    """A checkpoint, read one leaf at a time: a file of jaxvq, or any safetensors file (each tensor a leaf).

    Attributes:
      path: the file.
      is_jaxvq: whether jaxvq wrote it.
      leaves: its leaves by name, shapes in place of arrays.
      metadata: the texts kept with it.
      file_nbytes: bytes of the file.
      header_nbytes: bytes before the data.

    Raises:
      FileNotFoundError: if there is no such file.
      FileFormatError: if its header is damaged or of a later version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.container = Reader(path)
        self.path = self.container.path
        self.file_nbytes = self.container.file_nbytes
        self.header_nbytes = self.container.header_nbytes
        self.is_jaxvq = self.container.metadata.get("format") == FORMAT
        try:
            if self.is_jaxvq:
                self.leaves, self.metadata = self._parse()
            else:
                tensors = self.container.tensors
                self.leaves = {name: Leaf(name, (name,), _listed(tensor)) for name, tensor in tensors.items()}
                self.metadata = self.container.metadata
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.container.close()

    def require_jaxvq(self) -> None:
        """Raises FileFormatError unless jaxvq wrote the file."""
        if not self.is_jaxvq:
            self.container.fail("`format`", "is not jaxvq: not a jaxvq file; `jaxvq quantize` makes one from it")

    def templates(self) -> dict[str, Any]:
        """The leaves by name, as shapes. Raises ValueError for a dtype that cannot be read."""
        for tensor in self.container.tensors.values():
            _ = tensor.dtype
        return {name: leaf.value for name, leaf in self.leaves.items()}

    def read(self, name: str) -> Any:
        """One leaf: an array or a QuantizedArray.

        Raises:
          FileFormatError: if it does not match its checksum, or a code is beyond its decoder.
        """
        template = self.leaves[name].value
        if not isinstance(template, QuantizedArray):
            return to_jax(self.container.read(name)) if parts(name, template) else template
        array = fill(template, name, self._read_part)
        entries = array.decoder.entries(array.codes.bits)
        if entries < 2**array.codes.bits:
            largest = max((int(codes.max()) for _, _, codes in iter_codes(array.codes) if codes.size), default=0)
            if largest >= entries:
                problem = f"must be below the {entries} entries of the decoder, got {largest}; the file is damaged"
                self.container.fail(f"`{name}#codes`", problem)
        return array

    def _read_part(self, name: str) -> jax.Array:
        part = to_jax(self.container.read(name))
        if not isinstance(part, jax.Array):
            raise FileFormatError(f"{self.path}: `{name}` has 64 bits; set jax_enable_x64 to load it")
        return part

    def _parse(self) -> tuple[dict[str, Leaf], dict[str, str]]:
        reader, metadata = self.container, self.container.metadata
        version = metadata.get("version", "")
        if version.isdecimal() and version.isascii() and len(version) < 9 and int(version) > VERSION:
            reader.fail("`version`", f"is {version}, later than {VERSION}; upgrade jaxvq to read it")
        if version != str(VERSION):
            reader.fail("`version`", f"must be {VERSION}, got {version[:20]!r}; the file is damaged")
        reader.use_checksums()
        entries = reader.json(f'{{"leaves":{metadata.get("leaves", "")}}}', "`leaves`")["leaves"]
        if not isinstance(entries, list):
            reader.fail("`leaves`", "must be a list; the file is damaged")
        leaves = [parse(entry, reader) for entry in entries]
        claimed = [part for leaf in leaves for part in leaf.parts()]
        if len({leaf.name for leaf in leaves}) != len(leaves) or sorted((*claimed, CHECKSUMS)) != sorted(
            reader.tensors
        ):
            reader.fail("`leaves`", "do not account for each tensor once; the file is damaged")
        user = reader.json(metadata.get("metadata", "{}"), "`metadata`")
        if not all(isinstance(value, str) for value in user.values()):
            reader.fail("`metadata`", "must hold texts only; the file is damaged")
        return {leaf.name: leaf for leaf in leaves}, user


class CheckpointWriter:
    """Writes a file of jaxvq leaf by leaf, in any order, from shapes known in advance.

    A context manager: the file appears under its name at the end; an error removes what was written.

    Args:
      path: the file to make.
      template: the tree to write, or its shapes: `jax.ShapeDtypeStruct`s and QuantizedArrays of them.
      metadata: texts to keep with it.
      force: replace the file if it exists.
      token: what the leaves are made from. With a token, an interrupt keeps `<path>.partial`, and a later writer of
        the same template, metadata and token goes on from there: it skips what is `done`.

    Raises:
      As `save` does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        template: Any,
        *,
        metadata: Mapping[str, str] | None = None,
        force: bool = False,
        token: str | None = None,
    ) -> None:
        leaves = flatten(template)
        texts = {"format": FORMAT, "version": str(VERSION)}
        texts["leaves"] = json.dumps([leaf.to_json() for leaf in leaves], separators=(",", ":"))
        if metadata:
            texts["metadata"] = json.dumps(check_texts(metadata))
        tensors = [tensor_of(name, part) for leaf in leaves for name, part in leaf.parts().items()]
        self._parts = {leaf.name: tuple(leaf.parts()) for leaf in leaves}
        self._writer = Writer(path, tensors, texts, checksums=True, force=force, token=token)
        self.partial = self._writer.partial

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._writer.__exit__(kind, *exc)

    def done(self, name: str) -> bool:
        """Whether an earlier, interrupted run wrote this leaf."""
        return all(self._writer.done(part) for part in self._parts[name])

    def write(self, name: str, leaf: Any) -> None:
        """Writes one leaf."""
        for part, array in parts(name, leaf).items():
            self._writer.write(part, array)


def check_texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` as a dictionary. Raises TypeError unless it maps texts to texts."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"`metadata` must map texts to texts, got {key!r}: {value!r}; use str() or json.dumps")
    return dict(metadata)


def to_jax(array: np.ndarray) -> jax.Array | np.ndarray:
    """The same values as a JAX array, or `array` itself where JAX would drop 64-bit precision."""
    converted = jax.device_put(array)  # `jax.numpy.asarray` would make a copy
    return converted if converted.dtype == array.dtype else array


def _listed(tensor: Tensor) -> Any:
    """The shape of a tensor, or of the bytes of one whose values cannot be read."""
    return struct_of(tensor) if tensor.bits % 8 == 0 else jax.ShapeDtypeStruct((tensor.nbytes,), np.uint8)


def _fill_like(path: Path, like: Any, values: Mapping[str, Any]) -> Any:
    leaves = flatten(like)
    wanted = {leaf.name for leaf in leaves if leaf.parts()}
    present = {name for name, value in values.items() if parts(name, value)}
    if missing := sorted(wanted - present):
        raise ValueError(f"{path}: `like` has leaves that the file lacks: {', '.join(missing[:5])}; load without it")
    if extra := sorted(present - wanted):
        raise ValueError(f"{path}: `like` lacks leaves of the file: {', '.join(extra[:5])}; load without it")
    for leaf in (leaf for leaf in leaves if leaf.name in wanted):
        template, got = leaf.value, values[leaf.name]
        if (tuple(template.shape), template.dtype) != (tuple(got.shape), got.dtype):
            raise ValueError(
                f"{path}: `like` must have the shapes of the file: {leaf.name} is {got.dtype} {tuple(got.shape)}, "
                f"got {template.dtype} {tuple(template.shape)}; load without it"
            )
    filled = [values[leaf.name] if leaf.name in wanted else leaf.value for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_leaf), filled)
