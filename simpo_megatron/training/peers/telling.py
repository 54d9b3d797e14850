"""Errors of a rank that has not met the others yet, told to those that wait for it; torch is loaded for that alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from simpo_megatron.launched import is_launched


@contextmanager
def errors_told() -> Iterator[None]:
    """Reports an error raised in the context, before the ranks have met, to the ranks that wait for this one.

    Its `speaker` is the first rank that reported the same text: a mistake that all ranks find is printed once.
    """
    try:
        yield
    except Exception as error:
        if is_launched():
            from simpo_megatron.training.peers.meeting import tell

            tell(error)
        raise
