"""The package's messages through `logging`, and a filter for other packages' warnings that no user can act on."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from simpo_megatron.errors import ConfigError, status_line

LOGGER = logging.getLogger("simpo_megatron")


@contextmanager
def logged(level: str = "info", *, rank: int | None = None, folder: str | Path | None = None) -> Iterator[None]:
    """Prints this package's messages of `level` and above to stderr while the context lasts, one line each.

    Args:
        rank: named in every line; None in a command of one process.
        folder: also write this rank's messages to `folder`/rank0000.log and so on, with the time of each.

    Raises: ConfigError when `folder` cannot be written.
    """
    handlers: list[logging.Handler] = [_Stderr()]
    handlers[0].setFormatter(_Lines(rank))
    if folder is not None:
        handlers.append(_rank_file(Path(folder), rank or 0))
    before = LOGGER.level, LOGGER.propagate
    # A configured root logger would print every line a second time.
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False
    for handler in handlers:
        LOGGER.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.close()
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]


def ignore_known_warnings(*, has_cuda: bool) -> None:
    """Filters warnings of other packages that no user can act on; for the process of a command."""
    # Deprecations inside megatron and torch's checkpoints.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch\.distributed)\.")
    if not has_cuda:
        # megatron-core warns about each GPU package that is not installed; on a CPU none is needed.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")


def outlive_readers() -> None:
    """Lets the process go on when its output is closed, now or later; prints are discarded then."""
    sys.stdout, sys.stderr = (
        # None: closed when the process began. What is opened next would get the number of the descriptor.
        _Unbroken(open(os.devnull, "w", encoding="utf-8") if stream is None else stream)  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )


class _Unbroken:
    """A stream of text that never fails: `| head` ends, a terminal closes, a disk is full."""

    _GONE = (errno.EPIPE, errno.EIO)

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        if error.errno in self._GONE:
            # Python flushes its buffer when the process ends, so the descriptor must stay open.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Lines(logging.Formatter):
    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        return status_line(record.levelname, record.getMessage(), self._rank)


class _Stderr(logging.StreamHandler[TextIO]):
    """The current sys.stderr at each message: a progress bar replaces it while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _rank_file(folder: Path, rank: int) -> logging.Handler:
    path = folder / f"rank{rank:04d}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"save: found {path}, expected a file that can be written ({error.strerror})") from None
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}: %(message)s"))
    return handler
