"""Counts that tests keep in `counts.yaml`: what is found must not be more, and is written there when asked for."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("counts.yaml")
_RENEW = "SIMPO_RENEW_COUNTS"


def check_counts(section: str, found: dict[str, int], *, may_rise: float = 0.0) -> None:
    """Fail unless each count that was found is at most the one kept.

    Args:
        may_rise: by this share of itself.
    """
    assert found, f"{section}: found no count"
    counts = yaml.safe_load(FILE.read_text())
    kept = counts.setdefault(section, {})
    if os.environ.get(_RENEW):
        kept.update(found)
        _write(counts)
        return
    risen = [
        f"{name}: {number:,}, kept are {kept.get(name, 0):,}"
        for name, number in found.items()
        if number > (1 + may_rise) * kept.get(name, 0)
    ]
    assert not risen, f"{section} rose; if that is meant, {FILE.name} says how to renew: {'; '.join(risen)}"


def _write(counts: dict[str, dict[str, int]]) -> None:
    """Write `counts` below the comment at the head of the file."""
    head = FILE.read_text().split("\n\n", 1)[0]
    FILE.write_text(f"{head}\n\n{yaml.safe_dump(counts, sort_keys=False, width=120)}")
