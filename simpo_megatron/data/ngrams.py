"""The repetition of a sequence: an early sign of a model's collapse."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

NUM_GRAM = 4


def repetition(items: Sequence[Hashable]) -> float:
    """Share of the 4-grams of `items`, token ids or words, that occurred in them before; 0 for fewer than four.

    Source: seq-rep-4 of arXiv 1908.04319.
    """
    grams = [tuple(items[start : start + NUM_GRAM]) for start in range(len(items) - NUM_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
