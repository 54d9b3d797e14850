"""What lets the processor work while the disk does: the next tensor beside the write, the hash beside both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")
_END = object()
_SMALL_BYTES = 1 << 16


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """`items`, each made in a thread while the one before is in use: two are in memory at a time.

    An error in the making is raised where the item is asked for.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, iterator, _END)
            yield item


class HashedFile:
    """A new file, hashed while it is written, and on the disk at the end of its context."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.failure: OSError | None = None
        self._file = open(path, "wb")  # noqa: SIM115 - the context is this object's
        self._sha256 = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)

    @property
    def sha256(self) -> str:
        """64 hex digits of everything written so far."""
        return self._sha256.hexdigest()

    def write(self, data) -> int:
        """Bytes of `data` that were written: all."""
        data = memoryview(data).cast("B")
        if len(data) < _SMALL_BYTES:
            self._sha256.update(data)
            self._file.write(data)
        else:
            hashed = self._hasher.submit(self._sha256.update, data)
            try:
                self._file.write(data)
            except OSError as error:
                # torch.save puts an error of its own in its place.
                self.failure = error
                raise
            finally:
                hashed.result()
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: the end of the context does, and whoever writes asks for it after each tensor."""

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        with self._file:
            if self.failure is not None:
                raise self.failure
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
