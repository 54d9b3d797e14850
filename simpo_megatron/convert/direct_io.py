"""Files of weights, written directly to the disk, past the system's page cache."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

_BLOCK_BYTES = 4096
_BUFFER_BYTES = 16 << 20


class DirectFile:
    """A new file written directly to the disk; when its context ends it is there, and hashed if that was asked for.

    Weights are written once and read much later. In the page cache they would evict data that is needed, and the copy
    costs more than the disk. Writing and hashing run in threads, each on a full buffer. Where a file system has no
    direct writes, ordinary ones are used.
    """

    def __init__(self, path: Path, *, hashed: bool = False) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256() if hashed else None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._is_direct = self._becomes_direct()
        # A direct write must start at a page of memory, which a mapping does.
        self._filling, self._leaving = (memoryview(mmap.mmap(-1, _BUFFER_BYTES)) for _ in range(2))
        self._num_filled = 0
        self._work: list[Future[None]] = []
        self._threads = ThreadPoolExecutor(2)

    @property
    def sha256(self) -> str:
        """64 hex digits of everything written, once the context has ended."""
        assert self._sha256 is not None, "the file was opened without `hashed`"
        return self._sha256.hexdigest()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Writes `data`; returns the number of its bytes.

        Raises:
            OSError: an earlier write failed. The end of the context raises it again, in case the caller hides it.
        """
        left = whole = memoryview(data).cast("B")
        while left:
            taken = left[: _BUFFER_BYTES - self._num_filled]
            self._filling[self._num_filled : self._num_filled + len(taken)] = taken
            self._num_filled += len(taken)
            left = left[len(taken) :]
            if self._num_filled == _BUFFER_BYTES:
                self._hand_over()
        self.size += len(whole)
        return len(whole)

    def flush(self) -> None:
        """Does nothing: torch calls it after each tensor, and the end of the context flushes."""

    def _hand_over(self) -> None:
        """Start writing and hashing the full buffer, once the previous one is done."""
        self._join()
        filled = self._filling[: self._num_filled]
        # Direct writes take whole blocks; the padding of the last one is cut off at the end.
        blocks = self._filling[: self._num_filled + -self._num_filled % _BLOCK_BYTES]
        self._work = [self._threads.submit(self._write_blocks, blocks)]
        if self._sha256 is not None:
            self._work.append(self._threads.submit(self._sha256.update, filled))
        self._filling, self._leaving, self._num_filled = self._leaving, self._filling, 0

    def _join(self) -> None:
        wait(self._work)
        for done in self._work:
            done.result()

    def _write_blocks(self, blocks: memoryview) -> None:
        while blocks:
            try:
                blocks = blocks[os.write(self._descriptor, blocks) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                # Some file systems refuse direct writes only here.
                self._is_direct = False
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, 0)

    def _becomes_direct(self) -> bool:
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            return False
        return True

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._hand_over()
            self._join()
            if kind is None:
                os.ftruncate(self._descriptor, self.size)
                os.fsync(self._descriptor)
        finally:
            self._threads.shutdown()
            os.close(self._descriptor)
