"""Files of torch.save read without unpickling: common.pt, and the tensors and objects in a checkpoint's shards.

torch's own reader, even with `weights_only`, calls functions that the file names, with arguments from the file. Here
names are inert, tensors are made from the bytes beside the pickle, and sizes are checked against the file's first.

Source: pytorch/pytorch, torch/serialization.py, `_save`: a zip archive of stored entries, data.pkl and data/KEY.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from os import PathLike
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from simpo_megatron.checkpoint.inert_pickle import (
    Inert,
    InertUnpickler,
    Persistent,
    PlainValues,
    number,
    shown,
    size_of,
)
from simpo_megatron.errors import StoppedBySignal

_MAX_PICKLE_BYTES = 16 << 20
_LOCAL_HEADER_BYTES = 30
_REBUILDS = {"_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_torch_file(file: str | PathLike[str] | IO[bytes], *_: Any, **__: Any) -> Any:
    """The plain values and tensors in `file`, on the CPU; accepts and ignores torch.load's other arguments.

    Raises:
        pickle.UnpicklingError: it is no such archive, or holds anything else.
        OSError: it cannot be read.
    """
    if isinstance(file, (str, PathLike)):
        with Path(file).open("rb") as opened:
            return read_torch_file(opened)
    try:
        return _Archive(file).value()
    except (pickle.UnpicklingError, OSError, StoppedBySignal):
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


class _Seekable(io.RawIOBase):
    """A view of `file` with the usual tell and seek; torch's views of a shard count from the file's start."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.seek(0, io.SEEK_END)
        self.size, self._at = file.tell(), 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if self._at < 0:
            raise OSError("a place before the file's start")
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = memoryview(buffer)[: max(self.size - self._at, 0)]
        self._file.seek(self._at)
        count = cast(io.BufferedIOBase, self._file).readinto(left) if left else 0
        self._at += count
        return count


class _Archive:
    """The entries of one file, by their names without the folder that all of them are in."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = _Seekable(file)
        with zipfile.ZipFile(self._file) as archive:
            entries = archive.infolist()
        self._entries = {info.filename.partition("/")[2]: info for info in entries}
        self._storages: dict[str, Tensor] = {}
        if sum(info.file_size for info in entries) > self._file.size:
            raise pickle.UnpicklingError("its entries have more bytes than the file")
        if "byteorder" in self._entries and bytes(self._read("byteorder").numpy()).decode() != sys.byteorder:
            raise pickle.UnpicklingError("its numbers have the other byte order")

    def value(self) -> Any:
        if self._entries["data.pkl"].file_size > _MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"its pickle has more than {_MAX_PICKLE_BYTES} bytes")
        pickled = io.BytesIO(bytes(self._read("data.pkl").numpy()))
        return PlainValues(self._made).of(InertUnpickler(pickled, _knows).load())

    def _made(self, value: Inert) -> Any:
        if value.name == "Size":
            return size_of(value)
        if value.name in _REBUILDS and len(value.arguments) >= 4:
            return self._tensor(*value.arguments[:4], given=value.arguments[6:7])
        raise pickle.UnpicklingError(f"it has {shown(value)} for a plain value")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *, given: tuple[Any, ...]) -> Tensor:
        """The tensor of some bytes; of dtypes without a storage of their own, the dtype is `given`."""
        pid = storage.pid if isinstance(storage, Persistent) else None
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or type(pid[2]) is not str:
            raise pickle.UnpicklingError("a tensor has no storage")
        kind = pid[1].name if isinstance(pid[1], type) and issubclass(pid[1], Inert) else ""
        dtype = given[0] if given and isinstance(given[0], torch.dtype) else _DTYPES.get(kind)
        if dtype is None:
            raise pickle.UnpicklingError(f"a tensor is stored as {kind or shown(pid[1])}")
        if pid[2] not in self._storages:
            self._storages[pid[2]] = self._read(f"data/{pid[2]}")
        values = self._storages[pid[2]].view(dtype)
        shape = size_of(size)
        if math.prod(shape) > values.numel():
            # With strides of 0, a file of some bytes would be a tensor of any size.
            raise pickle.UnpicklingError("a tensor has more elements than are stored")
        return torch.as_strided(values, shape, size_of(stride), number(offset))

    def _read(self, name: str) -> Tensor:
        """The bytes of an entry: uint8."""
        info = self._entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise pickle.UnpicklingError(f"its entry {name} is compressed")
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER_BYTES)
        start = info.header_offset + _LOCAL_HEADER_BYTES + sum(
            int.from_bytes(header[at : at + 2], "little") for at in (26, 28)
        )  # fmt: skip
        if not 0 <= start <= start + info.file_size <= self._file.size:
            raise pickle.UnpicklingError(f"its entry {name} reaches beyond the file")
        values = torch.empty(info.file_size, dtype=torch.uint8)
        self._file.seek(start)
        left = memoryview(values.numpy().data)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise pickle.UnpicklingError(f"its entry {name} is cut short")
            left = left[count:]
        return values


def _knows(module: str, name: str) -> bool:
    is_torch = module == "torch" and (name == "Size" or name in _DTYPES)
    is_untyped = (module, name) == ("torch.storage", "UntypedStorage")
    return is_torch or is_untyped or (module == "torch._utils" and name in _REBUILDS)
