"""Bounds for programs that come with other people's files: the chat templates of models, interpolations of YAML."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_STATM = Path("/proc/self/statm")
# An exception may be raised where Python drops it, in a destructor for one; then the next signal counts.
_REPEAT_SECONDS = 0.5

_is_limited = False


class LimitError(Exception):
    """A program that took more time than it was given."""


@contextmanager
def limited(*, cpu_seconds: float, num_bytes: int) -> Iterator[None]:
    """Ends what runs in the context past `cpu_seconds` of this process, or past `num_bytes` of new memory.

    Inside another such context it starts that one's time anew and costs a microsecond: a loop over many small programs
    is put into one of its own.

    Both limits are the kernel's: they hold inside one long operation of Python's as well. A stopped or starved process
    spends nothing. Outside the main thread, which alone gets signals, nothing is limited, nor memory without Linux.

    Raises:
        LimitError: the time is over.
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
    """The limits of this process's own memory as they were, before `num_bytes` more than now became the soft one."""
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
