"""A safetensors file written tensor by tensor.

The safetensors library writes a whole file at once, and so needs all of it in memory.
"""

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxvq._container import CHECKSUMS, MAX_HEADER_NBYTES, METADATA, Tensor, tensor_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


class Writer:
    """Writes a safetensors file tensor by tensor, in any order, and resumes where an earlier run was stopped.

    The bytes go to `<path>.partial`, which `commit` completes, syncs and renames. While it is written, that file
    ends with the checksum of each tensor done and with `token`, a text that says what the data is made from. A later
    writer with the same header and token keeps the tensors that match their checksums; any other starts afresh.

    As a context manager it commits at the end. An error removes the partial file, and so does an interrupt,
    unless there is a token to resume by.

    Args:
      path: the file to make.
      tensors: what it will hold. `start` is ignored: the widest dtypes come first, which aligns them all.
      metadata: its `__metadata__`.
      checksums: whether to add the tensor `#crc32`.
      force: whether to replace an existing file.
      token: what the data is made from; None never resumes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Sequence[Tensor],
        metadata: Mapping[str, str],
        *,
        checksums: bool = False,
        force: bool = False,
        token: str | None = None,
    ) -> None:
        self.path = Path(path)
        _check_target(self.path, force)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._keep = token is not None
        extra = [Tensor(CHECKSUMS, "U32", (len(tensors) + 1,))] if checksums else []
        self._tensors = _arrange((*tensors, *extra))
        self._slots = {name: index for index, name in enumerate(self._tensors) if name != CHECKSUMS}
        self._header = _header(self._tensors, metadata)
        self._end = len(self._header) + sum(tensor.nbytes for tensor in self._tensors.values())
        self._trailer = 4 * len(self._tensors)
        self.partial.touch()
        self._file = open(self.partial, "r+b")  # noqa: SIM115 (closed by `commit` or `_close`)
        self._lock()
        try:
            self._begin((token or "").encode())
        except BaseException as error:
            self._close(type(error))
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            self._close(kind)
            return
        try:
            self.commit()
        except BaseException as error:
            self._close(type(error))
            raise

    def done(self, name: str) -> bool:
        """Whether the partial file already holds this tensor, by its checksum."""
        tensor = self._tensors[name]
        expected = self._read_crc(self._slot(name))
        if expected == 0:  # never written: spares reading the hole
            return tensor.nbytes == 0
        self._file.seek(len(self._header) + tensor.start)
        crc, left = 0, tensor.nbytes
        while left:
            chunk = self._file.read(min(left, 1 << 24))
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
        return crc == expected

    def write(self, name: str, array: Any) -> None:
        """Writes one tensor."""
        tensor = self._tensors[name]
        assert (tensor_of(name, array).code, tuple(array.shape)) == (tensor.code, tensor.shape), tensor
        native = np.asarray(array)
        # `order="C"`: the file holds the values row by row, whatever the strides of the array
        values = np.asarray(native, dtype=native.dtype.newbyteorder("<"), order="C")
        data = values.reshape(-1).view(np.uint8).data
        self._file.seek(len(self._header) + tensor.start)
        self._file.write(data)
        self._file.seek(self._slot(name))
        self._file.write(struct.pack("<I", zlib.crc32(data)))

    def commit(self) -> None:
        """Completes the file and gives it its name. All tensors must have been written."""
        if CHECKSUMS in self._tensors:
            slots = [self._slot(name) for name in self._slots]
            crcs = [zlib.crc32(self._header), *(self._read_crc(slot) for slot in slots)]
            self._file.seek(len(self._header) + self._tensors[CHECKSUMS].start)
            self._file.write(np.array(crcs, "<u4").tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())  # takes long: an interrupt here can still resume
        self._file.truncate(self._end)
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)
        if os.name == "posix":
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _slot(self, name: str) -> int:
        return self._end + 4 * self._slots[name]

    def _read_crc(self, slot: int) -> int:
        self._file.seek(slot)
        return int.from_bytes(self._file.read(4), "little")

    def _close(self, kind: type[BaseException]) -> None:
        try:
            self._file.close()
        finally:
            if not self._keep or issubclass(kind, Exception):
                self.partial.unlink(missing_ok=True)

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise FileExistsError(f"{self.partial}: another run is writing this file; wait for it") from error

    def _begin(self, token: bytes) -> None:
        total = self._end + self._trailer + len(token)
        same = self._keep and os.fstat(self._file.fileno()).st_size == total
        if same and self._file.read(len(self._header)) == self._header:
            self._file.seek(self._end + self._trailer)
            if self._file.read() == token:
                return
        self._file.truncate(0)
        self._file.seek(0)
        self._file.write(self._header)
        self._file.truncate(self._end + self._trailer)  # zeros: no tensor matches a checksum of zero yet
        self._file.seek(self._end + self._trailer)
        self._file.write(token)
        self._file.flush()


def _check_target(path: Path, force: bool) -> None:
    if path.is_dir():
        raise FileExistsError(f"{path}: is a folder; name a file to write")
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already; use another name, or force=True (`--force`) to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; make it first")


def _arrange(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    arranged: dict[str, Tensor] = {}
    start = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.bits):
        if tensor.name in arranged or tensor.name == METADATA:
            raise ValueError(f"{tensor.name}: two leaves need this tensor name, or it is reserved; rename one")
        arranged[tensor.name] = dataclasses.replace(tensor, start=start)
        start += tensor.nbytes
    return arranged


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for tensor in tensors.values():
        offsets = [tensor.start, tensor.start + tensor.nbytes]
        content[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise ValueError(f"the header would take {len(text)} bytes, over {MAX_HEADER_NBYTES}; save fewer leaves a file")
    return struct.pack("<Q", len(text)) + text
