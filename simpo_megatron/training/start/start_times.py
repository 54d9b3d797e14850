"""The time of each phase of a start, from the beginning of this process to the end of its first step."""

from __future__ import annotations

import time
from typing import NamedTuple

import psutil


class Elapsed(NamedTuple):
    """Seconds, and how many of them are CPU time of this process."""

    seconds: float
    cpu_seconds: float


# By phase in the order in which they ended: the times since this process began.
_ends: dict[str, Elapsed] = {}


def end_phase(name: str) -> bool:
    """Note that a phase of the start has ended, where the next one begins; False where it has ended before."""
    if name in _ends:
        return False
    _ends[name] = since_the_start()
    return True


def since_the_start() -> Elapsed:
    """The times since this process began."""
    return Elapsed(time.time() - psutil.Process().create_time(), time.process_time())


def phases() -> dict[str, Elapsed]:
    """The times of each phase that has ended, in order."""
    begins = [Elapsed(0.0, 0.0), *_ends.values()]
    return {
        name: Elapsed(end.seconds - begin.seconds, end.cpu_seconds - begin.cpu_seconds)
        for (name, end), begin in zip(_ends.items(), begins, strict=False)
    }


def describe_start(*, every_phase: bool) -> str:
    """A line on the time to the end of the first step, and on that of the longest phase or of every one."""
    seconds, cpu_seconds = list(_ends.values())[-1]
    told = f"start     first step done {seconds:.1f} s after this process began ({cpu_seconds:.1f} s of CPU)"
    found = phases()
    if every_phase:
        parts = (f"{name} {times.seconds:.2f} ({times.cpu_seconds:.2f})" for name, times in found.items())
        return f"{told}: {', '.join(parts)}, in s (of CPU)"
    longest = max(found, key=lambda name: found[name].seconds)
    return f"{told}; longest phase: {longest}, {found[longest].seconds:.1f} s; --verbose tells all"
