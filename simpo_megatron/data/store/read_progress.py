"""Progress of reading a source: a bar on a terminal, and else a line in the log now and then."""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from simpo_megatron.data.sources import COMPRESSIONS, is_on_hub

if TYPE_CHECKING:
    from rich.progress import Progress

_LOGGER = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 30.0


class ReadProgress:
    """Shows how many records of `path` are tokenised, and the share of its bytes where it is a file of lines."""

    def __init__(self, path: str) -> None:
        self._path, self._num_bytes = path, _size_of_lines(path)
        self._records = self._bytes = 0
        self._said_at = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None
        if self._bar is not None:
            name = os.path.basename(path.rstrip("/"))
            self._task = self._bar.add_task(f"tokenising {name}", total=self._num_bytes, records=0)

    def __enter__(self) -> ReadProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self, num_records: int, num_bytes: int) -> None:
        """Counts records and bytes that are done."""
        self._records += num_records
        self._bytes += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes if self._num_bytes else None, records=self._records)
        elif time.monotonic() - self._said_at > _SECONDS_BETWEEN_LINES:
            share = f" ({self._bytes / self._num_bytes:.0%})" if self._num_bytes else ""
            _LOGGER.info("%s: %s records%s are tokenised", self._path, f"{self._records:,}", share)
            self._said_at = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.fields[records]:,} records"), TimeRemainingColumn())
    return Progress(
        TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True, refresh_per_second=2
    )


def _size_of_lines(path: str) -> int | None:
    """Bytes of an uncompressed file; None where the bytes of its records do not add up to a size."""
    if is_on_hub(path) or path.lower().endswith(tuple(COMPRESSIONS)) or not os.path.isfile(path):
        return None
    return os.path.getsize(path) or None
