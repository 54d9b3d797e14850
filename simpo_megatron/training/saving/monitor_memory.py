"""The memory of monitors in a checkpoint, and the check of what one says it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simpo_megatron.errors import CheckpointError

LINES = ("loss", "rewards/saturated", "rewards/length_correlation")
"""Metrics whose last values monitors keep, a list of each."""
TOLD, START, NUM_SKIPPED = "told", "start", "num_skipped_steps"
CHOSEN, PAIRS, REPETITION_AT_START = "chosen", "pairs", "repetition"
"""Keys of START, the evaluation before step 1: log-prob of chosen responses, fingerprint of the pairs, repetition."""

_MAX_COUNT = 1 << 32


def check_remembered(found: Mapping[str, Any], folder: Path) -> None:
    """Return if monitors can go on from `found`, in the checkpoint `folder`; what is missing they do without.

    Raises:
        CheckpointError: naming the first entry of another type, which no version has written.
    """
    told, start, skipped = found.get(TOLD, []), found.get(START), found.get(NUM_SKIPPED, 0)
    checks: list[tuple[str, Any, Callable[[Any], bool], str]] = [
        (name, found.get(name, []), _are_numbers, "numbers") for name in LINES
    ]
    checks += [
        (TOLD, told, _are_names, "names of monitors"),
        (START, start, _is_start, "numbers of an evaluation and the fingerprint of its pairs"),
        (NUM_SKIPPED, skipped, lambda value: type(value) is int and 0 <= value < _MAX_COUNT, "a number of steps"),
    ]
    for name, value, is_right, expected in checks:
        if not is_right(value):
            raise CheckpointError(
                f"{folder}: monitors: {name}: found {str(value)[:80]!r}, expected {expected}; resume an earlier step"
            )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_start(value: Any) -> bool:
    if value is None:
        return True
    is_table = isinstance(value, dict) and isinstance(value.get(PAIRS), str)
    return is_table and _is_number(value.get(CHOSEN)) and _is_number(value.get(REPETITION_AT_START, 0.0))


def _is_number(value: Any) -> bool:
    # NaN and infinity are below nothing.
    return type(value) in (int, float) and abs(value) < _MAX_COUNT
