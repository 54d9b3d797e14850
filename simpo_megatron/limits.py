"""Time and memory limits for foreign programs: the chat templates of models, interpolations of YAML."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_STATM = Path("/proc/self/statm")
# Python may drop an exception that is raised in a destructor; then the next signal raises it again.
_REPEAT_SECONDS = 0.5

_is_limited = False


class LimitError(Exception):
    """A program that took more time than it was given."""


@contextmanager
def limited(*, cpu_seconds: float, num_bytes: int) -> Iterator[None]:
    """Interrupts the context after `cpu_seconds` of this process, or after `num_bytes` of new memory.

    Inside another such context it restarts that one's time, at the cost of a microsecond. So a loop over many small
    programs has one context around it.

    The kernel enforces both limits, also inside one long operation of Python's. Only CPU time counts, not waiting.
    Only the main thread gets signals: in other threads nothing is limited. Memory is limited only on Linux.

    Raises:
        LimitError: the time has passed.
        MemoryError: the memory is used up.
    """
    global _is_limited
    if threading.get_ident() != threading.main_thread().ident:
        yield
        return
    if _is_limited:
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, _REPEAT_SECONDS)
        yield
        return
    data_before, handler_before = _limit_data(num_bytes), signal.signal(signal.SIGVTALRM, _raise)
    try:
        _is_limited = True
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, _REPEAT_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler_before)
        _is_limited = False
        if data_before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, data_before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise LimitError("it takes too long")


def _limit_data(num_bytes: int) -> tuple[int, int] | None:
    """Sets the soft limit of this process's memory to `num_bytes` more than now; returns the limits before."""
    try:
        num_pages = int(_STATM.read_bytes().split()[5])
    except OSError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = num_pages * resource.getpagesize() + num_bytes
    if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in (soft, hard)):
        return None
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    return soft, hard
