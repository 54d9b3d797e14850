"""License and languages of the base model, from its model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_MAX_CARD_BYTES = 1 << 20
# A license and its page, or languages, as one value or as a list.
_ENTRY = re.compile(r"^(license|license_name|license_link|language)[ \t]*:[ \t]*(\S.*)?$")
_ITEM = re.compile(r"^[ \t]*-[ \t]+(\S+)[ \t]*$")


def facts_of_card(path: Path | None) -> dict[str, Any]:
    """License and languages in the front matter of the card `path`; empty where there is none.

    The front matter is not trusted, so it is read line by line, without a YAML loader.
    """
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.read(_MAX_CARD_BYTES).splitlines()
    except (OSError, ValueError):
        return {}
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    found: dict[str, Any] = {}
    block = lines[1 : lines.index("---", 1)]
    for number, line in enumerate(block):
        entry = _ENTRY.match(line)
        if entry is None:
            continue
        values = _values(entry[2], block[number + 1 :])
        if values and all(value.isprintable() and len(value) <= 200 for value in values):
            found[entry[1]] = values if entry[1] == "language" else values[0]
    return found


def _values(first: str | None, lines: list[str]) -> list[str]:
    """The values of an entry: the one beside its key, or the items below it."""
    if first:
        return [value.strip().strip("'\"") for value in first.strip().strip("[]").split(",") if value.strip()]
    values: list[str] = []
    for line in lines:
        item = _ITEM.match(line)
        if item is None:
            break
        values.append(item[1].strip("'\""))
    return values
