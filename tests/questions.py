"""A question, and JSON lines as files of prompts, answers and scores hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTION = ({"role": "user", "content": "How do I boil an egg?"},)


def written(path: Path, *rows: Any) -> Path:
    """`path`, with a line for each of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
