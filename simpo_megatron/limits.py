"""Limits for foreign files and programs: sizes to read, chat templates of models, interpolations of YAML."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_STATM = Path("/proc/self/statm")
# Python may drop an exception that is raised in a destructor; then the next signal raises it again.
_REPEAT_SECONDS = 0.5
_POLL_SECONDS = 0.05

_is_limited = False


def check_plain(path: Path, most_bytes: int) -> None:
    """Return if `path`, links followed, is a file of at most `most_bytes` that this process may read.

    Raises:
        OSError: it is not there, or is larger, or is a folder, a pipe or a device, whose reading might never end.
    """
    _check(os.stat(path), path, most_bytes)
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The content of the file `path`, links followed.

    Raises:
        OSError: as `check_plain`, or it cannot be read.
    """
    # Without O_NONBLOCK the open of a pipe waits for whoever may write into it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        _check(os.fstat(file.fileno()), path, most_bytes)
        return file.read(most_bytes)


def _check(found: os.stat_result, path: Path, most_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file", str(path))
    if found.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, more than {most_bytes}", str(path))


class LimitError(Exception):
    """A program that took more time than it was given."""


@contextmanager
def limited(*, cpu_seconds: float, num_bytes: int) -> Iterator[None]:
    """Interrupts the context after `cpu_seconds` of this process, or after `num_bytes` of new memory.

    Inside another such context it restarts that one's time, at the cost of a microsecond. So a loop over many small
    programs has one context around it.

    The kernel enforces both limits, also inside one long operation of Python's. Only CPU time counts, not waiting.
    Only the main thread gets signals. Any other thread is watched by one more, which interrupts it between two
    operations. Memory is limited only on Linux.

    Raises:
        LimitError: the time has passed.
        MemoryError: the memory is used up.
    """
    global _is_limited
    if threading.get_ident() != threading.main_thread().ident:
        with _watched(cpu_seconds, num_bytes):
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
    data = _data_bytes()
    if data is None:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data + num_bytes
    if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in (soft, hard)):
        return None
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    return soft, hard


def _data_bytes() -> int | None:
    """This process's own memory; None where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[5]) * resource.getpagesize()
    except OSError:
        return None


_of_thread = threading.local()


@contextmanager
def _watched(cpu_seconds: float, num_bytes: int) -> Iterator[None]:
    """`limited` for a thread that is not the main one."""
    outer: _Watch | None = getattr(_of_thread, "watch", None)
    if outer is not None:
        outer.restart(cpu_seconds)
        yield
        return
    _of_thread.watch = watch = _Watch(cpu_seconds, num_bytes)
    try:
        yield
    finally:
        watch.end()
        _of_thread.watch = None


class _Watch:
    """A thread that raises an error in the one that made it, past limits of time and memory, until `end`."""

    def __init__(self, cpu_seconds: float, num_bytes: int) -> None:
        self._target = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._target)
        self._num_bytes = num_bytes
        self._raising, self._is_over = threading.Lock(), threading.Event()
        self.restart(cpu_seconds)
        threading.Thread(target=self._watch, name="limits", daemon=True).start()

    def restart(self, cpu_seconds: float) -> None:
        self._until = time.clock_gettime(self._clock) + cpu_seconds

    def end(self) -> None:
        self._is_over.set()
        with self._raising:
            # What was asked for and has not been raised would be raised in whatever this thread does next.
            _raise_in(self._target, None)

    def _watch(self) -> None:
        # Not before this thread has its stack, which counts.
        pause, most_bytes = _POLL_SECONDS, (_data_bytes() or 0) + self._num_bytes
        while not self._is_over.wait(pause):
            with self._raising:
                if self._is_over.is_set():
                    return
                error = self._exceeded(most_bytes)
                pause = _POLL_SECONDS if error is None else _REPEAT_SECONDS
                if error is not None:
                    _raise_in(self._target, error)

    def _exceeded(self, most_bytes: int) -> type[Exception] | None:
        if time.clock_gettime(self._clock) > self._until:
            return LimitError
        return MemoryError if (_data_bytes() or 0) > most_bytes else None


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Have `error` raised in another thread before its next operation; None takes back what was not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))
