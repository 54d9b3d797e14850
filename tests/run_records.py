"""The records of metrics.jsonl, without what depends on the machine and on what else it does."""

from __future__ import annotations

import json
from pathlib import Path

SPEED_KEYS = {
    "pairs_per_second",
    "tokens_per_second",
    "tflops_per_gpu",
    "data_seconds",
    "forward_backward_seconds",
    "optimizer_seconds",
    "peak_memory_gib",
}
# Said of a run only where one rank is slower than its peers.
STRAGGLER_KEYS = {"slowest_rank", "slowest_rank_behind"}


def without_speed(record: dict) -> dict:
    """`record` as the same run would write it on any machine of this kind, at any time."""
    return {key: value for key, value in record.items() if key not in SPEED_KEYS | STRAGGLER_KEYS}


def read_records(metrics: Path) -> list[dict]:
    """The records of a metrics.jsonl without speed and memory."""
    return [without_speed(json.loads(line)) for line in metrics.read_text().splitlines()]
