"""Mutations of JSON files: values of other types and sizes, keys lost and doubled, bytes cut, turned and put in."""

import copy
import json
import random
from typing import Any

JUNK = (
    None, True, False, 0, -1, 1, 3, 0.5, -0.0, float("nan"), float("inf"), 1e308, 2**31, 2**63, 10**30, -(2**63),
    "", " ", "x", "1", "None", "../x", "/etc/passwd", "a\x1b[2J\nb", "\ud800", "x" * 5000,
    [], {}, [None], [[]], [1, "a", None], {"a": 1}, {"": {}}, [0] * 2000, dict.fromkeys(map(str, range(500))),
)  # fmt: skip


def mutated_json(content: Any, numbers: random.Random) -> Any:
    """Returns a copy of `content` with one to three mutations of its values."""
    content = copy.deepcopy(content)
    for _ in range(numbers.randrange(1, 4)):
        holder, key = _place(content, numbers)
        if holder is None:
            return copy.deepcopy(numbers.choice(JUNK))
        action = numbers.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = numbers.choice(
                (-holder[key], holder[key] * 2, holder[key] + 1, holder[key] * 10**6, str(holder[key]))
            )
        elif action == 3:
            holder[key] = [holder[key]] if numbers.randrange(2) else {"a": holder[key]}
        else:
            holder[key] = copy.deepcopy(numbers.choice(JUNK))
    return content


def mutated_bytes(content: bytes, numbers: random.Random) -> bytes:
    """Returns `content` cut, with bytes turned, put in or repeated, or as other text."""
    at = numbers.randrange(len(content) + 1)
    return numbers.choice((
        content[:at],
        content[:at] + bytes([numbers.randrange(256)]) + content[at + 1 :],
        content[:at] + numbers.randbytes(numbers.randrange(1, 20)) + content[at:],
        content[:at] + b"[" * 3000 + content[at:],
        content[:at] + b"9" * 5000 + content[at:],
        content + content,
        content.decode("utf-8", "replace").encode("utf-16"),
        b"\xef\xbb\xbf" + content,
        b"",
    ))  # fmt: skip


def mutated_file(content: bytes, numbers: random.Random) -> bytes:
    """Returns one mutation of a JSON file, of its values four times out of five."""
    if numbers.randrange(5) == 0:
        return mutated_bytes(content, numbers)
    return json.dumps(mutated_json(json.loads(content), numbers)).encode()


def _place(content: Any, numbers: random.Random) -> tuple[Any, Any]:
    """Returns a holder and a key of it, somewhere in `content`; (None, None) where it holds nothing."""
    holder, key = None, None
    while isinstance(content, dict | list) and content and (holder is None or numbers.randrange(3)):
        holder = content
        key = numbers.choice(sorted(content)) if isinstance(content, dict) else numbers.randrange(min(len(content), 50))
        content = holder[key]
    return holder, key
