"""The results of benchmarks in one JSON file, which the variable SIMPO_BENCH names; else they are only printed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "SIMPO_BENCH"


def keep(benchmark: str, results: Any) -> None:
    """Put the `results` of a benchmark, JSON values, into the file."""
    name = os.environ.get(VARIABLE)
    if name is None:
        return
    path = Path(name)
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, benchmark: results}, indent=1) + "\n")
