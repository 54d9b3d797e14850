"""The options of what watches over a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What watches over a run."""

    probe_memory: bool = True
    """Run the largest packs once, without effect, before the first step: memory that does not suffice shows at
    once or never."""
