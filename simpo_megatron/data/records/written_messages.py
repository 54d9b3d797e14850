"""Messages that a table keeps as text, as CSV files do: JSON is read, Python's notation is refused."""

from __future__ import annotations

import json
import re

from simpo_megatron.data.records.forms import Columns
from simpo_megatron.data.records.messages import is_written_message
from simpo_megatron.data.records.parsing import BadRecord

# What JSON and Python's notation of messages begin with.
_OPENS = re.compile(r"\s*[\[{]")
# A list of messages as Python or pandas prints it, which no reader of JSON can take.
_PYTHON = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value)'\s*:")


def read_written(columns: Columns) -> None:
    """Parses messages that columns hold as JSON: of the prompt, a conversation, and responses that both are such.

    The names of these columns are added to `columns.written`.

    Raises: BadRecord for messages in Python's notation.
    """
    responses = columns.chosen, columns.rejected
    if not any(map(_opens, (*responses, columns.prompt, columns.conversation))):
        return
    if all(_is_python(text) for text in responses):
        raise _in_python("chosen")
    chosen, rejected = map(_messages, responses)
    if chosen is not None and rejected is not None:
        columns.chosen, columns.rejected = chosen, rejected
        columns.written.append("responses")
    for name in ("prompt", "conversation"):
        text, key = getattr(columns, name), getattr(columns, f"{name}_key")
        if _is_python(text):
            raise _in_python(key)
        if (messages := _messages(text)) is not None:
            setattr(columns, name, messages)
            columns.written.append(key)


def _opens(text: object) -> bool:
    return isinstance(text, str) and _OPENS.match(text) is not None


def _is_python(text: object) -> bool:
    return isinstance(text, str) and _PYTHON.match(text) is not None


def _in_python(name: str) -> BadRecord:
    return BadRecord(
        f"bad_type:{name}", f"{name} is a list in Python's notation, expected JSON; write it with json.dumps"
    )


def _messages(text: object) -> list | None:
    """Returns the messages in a text that is one or a list of them in JSON, else None."""
    if not isinstance(text, str) or not _opens(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    messages = [value] if isinstance(value, dict) else value
    return messages if messages and all(map(is_written_message, messages)) else None
