"""The exceptions a user may see: what was wrong, where, what was found, what was expected, what to do.

And the one way in which commands print them, and two phrases that many of their messages are made of.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable


class SimPOError(Exception):
    """Base of every error that is the user's to fix; its `exit_code` is the exit code of the process."""

    exit_code = 1


class ConfigError(SimPOError):
    """A key, a value or a combination of values that cannot be run."""

    exit_code = 2


class DataError(SimPOError):
    """A preference file or record that cannot be used; the message starts with `file:line`."""

    exit_code = 3


class CheckpointError(SimPOError):
    """A checkpoint or a Hugging Face folder that is missing, incomplete or not what it claims to be."""

    exit_code = 4


class NumericsError(SimPOError):
    """A loss, gradient or weight that is not finite."""

    exit_code = 5


class ParallelError(SimPOError):
    """Ranks that disagree, or a rank that did not arrive."""

    exit_code = 6


class PeerError(ParallelError):
    """This rank stopped because of another one, and what there is to say was said."""


class StoppedByMonitor(SimPOError):
    """A monitor that `stop_on` names found what it watches for; what it found was not saved."""

    exit_code = 7
    result: object = None
    """The RunResult of the run that was stopped."""


class StoppedBySignal(SimPOError):
    """No mistake: a signal asked the run to stop, and it did after a whole step; the same command continues it.

    The exit code is sysexits' EX_TEMPFAIL, which schedulers can be told to restart on.
    """

    exit_code = 75
    result: object = None
    """The RunResult of the run that was stopped."""


def printed(error: SimPOError) -> int:
    """Prints the line that every command ends with when it fails; returns the exit code."""
    print(f"ERROR simpo_megatron: {error}", file=sys.stderr)
    return error.exit_code


def require(holds: bool, key: str, found: object, expected: str) -> None:
    """Raises: ConfigError, the one line a user reads, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}: found {found!r}, expected {expected}")


def listed(things: Iterable[object], most: int, separator: str = ", ") -> str:
    """The first `most` of the things in one line, and how many more there are: `3, 5, 8 and 21 more`."""
    every = [str(thing) for thing in things]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return separator.join(every[:most]) + more
