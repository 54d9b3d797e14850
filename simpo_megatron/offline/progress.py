"""Progress of a long copy, with its time and memory at the end."""

from __future__ import annotations

import resource
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class Transfer:
    """A bar with bytes per second on a terminal, and one line at the end everywhere."""

    def __init__(self, title: str, num_bytes: int) -> None:
        """`num_bytes` are those that `advance` will count up to."""
        self.title, self.num_bytes = title, num_bytes
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = Console()
        self._bar = Progress(TextColumn(title), *columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=num_bytes)

    def __enter__(self) -> Transfer:
        self._started = time.perf_counter()
        self._bar.start()
        return self

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is None:
            seconds = time.perf_counter() - self._started
            print(
                f"{self.title}: {self.num_bytes / 2**20:,.1f} MiB in {seconds:.1f} s "
                f"({self.num_bytes / 2**20 / seconds:,.0f} MiB/s), peak memory {peak_memory() / 2**20:,.0f} MiB",
                flush=True,
            )


def peak_memory() -> int:
    """The peak memory of this process in bytes, mapped file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
