"""The safetensors file as bytes: what a tensor is there, and a reader that trusts nothing.

The safetensors library does not tell where a tensor's bytes lie (checksums need that), reads no bfloat16 into numpy,
and its memory map counts every page it read as memory of the process.
"""

import dataclasses
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

CHECKSUMS = "#crc32"
METADATA = "__metadata__"
MAX_HEADER_NBYTES = 100_000_000  # what the safetensors library accepts
MAX_RANK = 64
ALIGNMENT = 64  # bytes
NUMPY_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
CODE_NAMES = {name: code for code, name in NUMPY_NAMES.items()}
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # several values share a byte: listed, but not read


class FileFormatError(ValueError):
    """A file that cannot be read: damaged, foreign, or of a later version. Names the file, the tensor and the field."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      name: its name.
      code: its dtype, as safetensors writes it ("BF16").
      shape: its shape.
      start: where its bytes begin, from the end of the header.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def bits(self) -> int:
        """Bits per value."""
        return PACKED_BITS[self.code] if self.code in PACKED_BITS else 8 * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.bits // 8

    @property
    def dtype(self) -> np.dtype:
        """Its dtype in numpy. Raises ValueError where numpy has none."""
        if self.code in PACKED_BITS:
            raise ValueError(f"{self.name}: dtype {self.code} packs several values in a byte; convert the tensor first")
        return np.dtype(jnp.dtype(NUMPY_NAMES[self.code]))


def tensor_of(name: str, array: Any) -> Tensor:
    """The description of an array, or of anything with a shape and a dtype."""
    code = CODE_NAMES.get(getattr(array.dtype, "name", str(array.dtype)))
    if code is None:
        raise TypeError(f"{name}: safetensors has no dtype {array.dtype}; cast the array first")
    return Tensor(name, code, tuple(array.shape))


def checksums_nbytes(tensors: int) -> int:
    """Bytes of the checksums of a file with so many other tensors: one each and one for the header."""
    return 4 * (tensors + 1)


class Reader:
    """A safetensors file, read one tensor at a time.

    Attributes:
      path: the file.
      tensors: its tensors by name, in the order of their bytes.
      metadata: its `__metadata__`.
      header_nbytes: bytes before the first tensor's.
      file_nbytes: bytes in all.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file; check the name")
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: not a file; name a safetensors file")
        self._file = open(self.path, "rb")  # noqa: SIM115 (closed by `close`)
        self._checksums: dict[str, int] = {}
        try:
            self.file_nbytes = os.fstat(self._file.fileno()).st_size
            header = self._read_header()
            self.header_nbytes, self.header_crc = len(header), zlib.crc32(header)
            self.tensors, self.metadata = self._parse(header[8:])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def fail(self, where: str, problem: str) -> NoReturn:
        """Raises FileFormatError for the tensor or field `where`."""
        raise FileFormatError(f"{self.path}: {where} {problem}")

    def use_checksums(self) -> None:
        """From now on, `read` compares every tensor with its checksum; the header is compared here."""
        tensor = self.tensors.get(CHECKSUMS)
        others = [name for name in self.tensors if name != CHECKSUMS]
        if tensor is None or (tensor.code, tensor.shape) != ("U32", (len(others) + 1,)):
            self.fail(f"`{CHECKSUMS}`", f"must be U32 [{len(others) + 1}]; the file is damaged")
        header_crc, *crcs = self.read(CHECKSUMS).tolist()
        if header_crc != self.header_crc:
            self.fail("the header", "does not match its checksum; the file is damaged")
        self._checksums = dict(zip(others, crcs, strict=True))

    def read(self, name: str) -> np.ndarray:
        """One tensor. Raises FileFormatError where it does not match its checksum."""
        tensor = self.tensors[name]
        dtype = tensor.dtype
        data = _aligned(tensor.nbytes)
        self._file.seek(self.header_nbytes + tensor.start)
        if self._file.readinto(data.data) != tensor.nbytes:
            self.fail(f"`{name}`", "ends before its last byte; the file was cut short")
        if name in self._checksums and zlib.crc32(data.data) != self._checksums[name]:
            self.fail(f"`{name}`", "does not match its checksum; the file is damaged")
        return data.view(dtype).reshape(tensor.shape)

    def _read_header(self) -> bytes:
        first = self._file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(self.file_nbytes - 8, MAX_HEADER_NBYTES):
            self.fail("the header", "is longer than the file; it is damaged or not a safetensors file")
        header = first + self._file.read(length)
        if header[8:9] != b"{":
            self.fail("the header", "is not JSON; the file is damaged or not a safetensors file")
        return header

    def _parse(self, header: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
        content = self.json(header, "the header")
        metadata = content.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self.fail(f"`{METADATA}`", "must hold texts only; the file is damaged")
        tensors = sorted(
            (self._parse_tensor(name, entry) for name, entry in content.items()),
            key=lambda pair: (pair[0].start, pair[1]),
        )
        end = 0
        for tensor, stop in tensors:
            if tensor.start != end or stop - tensor.start != tensor.nbytes:
                self.fail(f"`{tensor.name}`", "`data_offsets` do not fit its shape and neighbours; the file is damaged")
            end = stop
        if len(header) + 8 + end != self.file_nbytes:
            self.fail("the data", f"must be {end} bytes long by the header; the file was cut short or is damaged")
        return {tensor.name: tensor for tensor, _ in tensors}, metadata

    def _parse_tensor(self, name: str, entry: Any) -> tuple[Tensor, int]:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            self.fail(f"`{name}`", "must have the fields dtype, shape, data_offsets; the file is damaged")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in (NUMPY_NAMES | PACKED_BITS):
            self.fail(f"`{name}`", f"`dtype` {str(code)[:40]!r} is unknown; the file is damaged or newer than jaxvq")
        if not is_sizes(shape) or len(shape) > MAX_RANK:
            self.fail(f"`{name}`", "`shape` must be a list of sizes; the file is damaged")
        if not is_sizes(offsets) or len(offsets) != 2:
            self.fail(f"`{name}`", "`data_offsets` must be two positions; the file is damaged")
        return Tensor(name, code, tuple(shape), offsets[0]), offsets[1]

    def json(self, text: bytes | str, where: str) -> dict[str, Any]:
        """The JSON object in `text`, its keys distinct. Raises FileFormatError, naming `where`."""
        try:
            content = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
        except (ValueError, RecursionError):
            self.fail(where, "is not valid JSON; the file is damaged or not a safetensors file")
        if not isinstance(content, dict):
            self.fail(where, "must be a JSON object; the file is damaged")
        return content


def _aligned(nbytes: int) -> np.ndarray:
    """Bytes that begin where JAX wants its arrays to; it would copy others instead of taking them as they are."""
    data = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -data.ctypes.data % ALIGNMENT
    return data[start : start + nbytes]


def is_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of whole numbers from 0 to 2**63 - 1."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
