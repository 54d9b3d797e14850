"""A check that several sections share."""

from __future__ import annotations

import re

from simpo_megatron.errors import require

_MAX_PATH_LENGTH = 1000


def require_writable_name(section: object, *keys: str) -> None:
    """Raises ConfigError for the first folder or name that a log line, a URL or a shell command cannot carry."""
    for key in keys:
        found = getattr(section, key)
        if found is None:
            continue
        # Quoted and cut short: the name itself may make a log unreadable.
        shown = found if len(found) <= 60 else found[:60] + "..."
        require(0 < len(found) <= _MAX_PATH_LENGTH, key, shown, f"1 to {_MAX_PATH_LENGTH} characters")
        require(found.isprintable(), key, shown, "no line breaks or control characters")
        require(".." not in re.split(r"[/\\]", found), key, shown, "a folder written without '..'")
