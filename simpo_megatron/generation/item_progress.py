"""Work on many items, several at a time, with lines of progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """At most one line in half a minute: how many of `total` things are done, and the time that is left.

    Args:
        what: the first word of a line, and the things that are counted.
    """

    def __init__(self, what: str, things: str, total: int) -> None:
        self._what, self._things, self._total = what, things, total
        self._begun = self._told = time.monotonic()

    def lines(self, num_done: int | Callable[[], int]) -> Iterator[str]:
        """The line on `num_done` things, which is a function where counting takes time, if it is time for one."""
        now = time.monotonic()
        if now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        took, done = now - self._begun, num_done if isinstance(num_done, int) else num_done()
        left = f", about {_clock(took / done * (self._total - done))} left" if done else ""
        yield f"{self._what:<9} {done:,} of {self._total:,} {self._things} in {_clock(took)}{left}"


def work_through(
    work: Callable[[Item], None], items: Sequence[Item], num_at_once: int, progress: Progress
) -> Iterator[str]:
    """Calls `work` with each of `items`, `num_at_once` at a time in threads; yields lines of progress.

    Raises: the first error of `work`, once the calls have ended that were begun; no others are.
    """
    if num_at_once == 1:
        # In this thread, which a signal can interrupt.
        for num_done, item in enumerate(items, 1):
            work(item)
            yield from progress.lines(num_done)
        return
    with ThreadPoolExecutor(num_at_once) as pool:
        pending = [pool.submit(work, item) for item in items]
        try:
            for num_done, one in enumerate(as_completed(pending), 1):
                one.result()
                yield from progress.lines(num_done)
        finally:
            pool.shutdown(cancel_futures=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
