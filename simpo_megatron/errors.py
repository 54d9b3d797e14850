"""The exceptions a user may see: what was wrong, where, what was found, what was expected, what to do.

Every message is one line, `KEY: found X, expected Y; what to do`. This module also has the one printer of the line
that a process ends with.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Characters that move a cursor, colour, hide or reverse text: C0 and C1, bidirectional marks, other line ends, the byte
# order mark, tags, and lone surrogates, which no terminal can encode.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_MAX_CHARACTERS = 500
_END_CHARACTERS = 140


class SimPOError(Exception):
    """Base of every error that the user can fix; its `exit_code` is the exit code of the process."""

    exit_code = 1
    kind = "ERROR"
    """First word of the line that reports it."""
    speaker: int | None = 0
    """The rank that reports it; None when that was done. What all ranks raise alike is rank 0's to say."""
    details: tuple[str, ...] = ()
    """Further lines below the one of the message, where there is more than one thing to mend."""


class ConfigError(SimPOError):
    """A key, a value or a combination of values that cannot be run."""

    exit_code = 2
    parts: tuple[ConfigError, ...] = ()
    """The errors that this one tells together."""


class Refusals:
    """The errors of one input, so that they are told together."""

    def __init__(self) -> None:
        self.found: list[ConfigError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keeps a ConfigError that is raised in the context, and goes on behind it."""
        try:
            yield
        except ConfigError as error:
            self.found.extend(error.parts or (error,))

    def raise_any(self) -> None:
        """Raises: ConfigError: the only error as it was raised, or the first with the others in its `details`."""
        if not self.found:
            return
        first, *others = self.found
        if not others:
            raise first from None
        told = ConfigError(f"{first} (and {len(others)} more, below)")
        told.parts = tuple(self.found)
        told.details = tuple(f"  {other}" for other in others)
        raise told from None


class DataError(SimPOError):
    """A preference file, record or token cache that cannot be used; of a record the message names file and line."""

    exit_code = 3


class CheckpointError(SimPOError):
    """A checkpoint or model folder that is missing, damaged or of another run, or that cannot be written."""

    exit_code = 4


class NumericsError(SimPOError):
    """A loss, gradient or weight that is not finite."""

    exit_code = 5


class ParallelError(SimPOError):
    """Ranks that disagree, or a rank that did not arrive."""

    exit_code = 6


class PeerFailedError(ParallelError):
    """Another rank failed; it already reported the error."""

    speaker: int | None = None


class StoppedByMonitor(SimPOError):
    """A monitor in `stop_on` raised an alarm; the step that caused it was not saved."""

    exit_code = 7
    kind = "STOPPED"
    result: object = None
    """The RunResult of the run that was stopped."""


class GateClosed(SimPOError):
    """A model that does not pass: worse than another by more than chance, or unlike its published score."""

    exit_code = 7
    kind = "CLOSED"


class StoppedBySignal(SimPOError):
    """A stop, not a mistake: a signal ended the run after a whole step; the same command continues it.

    The exit code is sysexits' EX_TEMPFAIL, which schedulers can be told to restart on.
    """

    exit_code = 75
    kind = "STOPPED"
    result: object = None
    """The RunResult of the run that was stopped."""


def visible(text: object, *, keep: str = "") -> str:
    """Returns `text` with every control or invisible character written as its escape, such as `\\x1b`.

    Args:
        keep: characters that stay, such as the newlines of a text of many lines.
    """

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return _UNSEEN.sub(escaped, str(text))


def status_line(kind: str, text: object, rank: int | None = None) -> str:
    """Returns `KIND simpo_megatron rank N: text` (without `rank`, `KIND simpo_megatron: text`), one line.

    Beyond 500 characters the middle is cut: the beginning and the end, which says what to do, stay.
    """
    line = visible(f"{kind} simpo_megatron{'' if rank is None else f' rank {rank}'}: {text}")
    if len(line) <= _MAX_CHARACTERS:
        return line
    return f"{line[: _MAX_CHARACTERS - _END_CHARACTERS - 5]} ... {line[-_END_CHARACTERS:]}"


def report_error(error: BaseException, *, rank: int | None = None, kind: str | None = None) -> int:
    """Prints the final line of a process to stderr; returns its exit code.

    Args:
        rank: this rank in a run of many; None in a command of one process.
        kind: first word of the line; the error's own when None.
    """
    ours = error if isinstance(error, SimPOError) else SimPOError(f"unexpected {type(error).__name__}: {error}")
    lines = [status_line(kind or ours.kind, ours, rank), *map(visible, ours.details)]
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    return ours.exit_code


def require(holds: bool, key: str, found: object, expected: str) -> None:
    """Raises ConfigError `key: found X, expected Y` unless `holds`; `expected` may end with `; what to do`."""
    if not holds:
        raise ConfigError(f"{key}: found {found!r}, expected {expected}")


def require_positive(section: object, *keys: str) -> None:
    """Raises ConfigError for the first attribute of `section` among `keys` that is neither None nor above 0."""
    for key in keys:
        found = getattr(section, key)
        require(found is None or found > 0, key, found, "a number above 0")


def listed(things: Iterable[object], most: int, separator: str = ", ") -> str:
    """The first `most` items in one line, and the number of the others: `3, 5, 8 and 21 more`."""
    every = [str(thing) for thing in things]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return separator.join(every[:most]) + more
