"""The prompts of a file: conversations, or several turns of a user that a model answers in order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.errors import DataError
from simpo_megatron.generation.lines import MAX_BYTES
from simpo_megatron.limits import read_bounded

Message = Mapping[str, str]
_IDS = ("id", "question_id", "uid", "prompt_id")
_TEXTS = ("prompt", "instruction", "question")


@dataclass(frozen=True)
class PromptItem:
    """One prompt."""

    id: str
    messages: tuple[Message, ...]
    """The conversation up to and including the first turn to answer."""
    later_turns: tuple[str, ...] = ()
    """The user's turns, one after each answer."""
    category: str | None = None


def read_prompts(path: Path) -> list[PromptItem]:
    """The prompts in a JSON Lines file, or in a JSON file that holds a list.

    A row has `messages`, `turns` (the user's turns in order, as in MT-Bench), or a `prompt`, `instruction` or
    `question` that is text or messages. Or it is a preference pair, whose prompt is taken. Its id is `id`,
    `question_id`, `uid` or `prompt_id`, else the number of its row.

    Raises: DataError naming the row, for one without a prompt, or an id that another row has.
    """
    items: dict[str, PromptItem] = {}
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: found {type(row).__name__}, expected an object with a prompt")
        item = _item(row, number, where)
        if not is_unicode(item.id, *item.later_turns, *(turn["content"] for turn in item.messages)):
            raise DataError(f"{where}: found half of a surrogate pair, expected text; mend the prompt or leave it out")
        if item.id in items:
            raise DataError(f"{where}: found the id {item.id!r} a second time, expected ids that differ")
        items[item.id] = item
    if not items:
        raise DataError(f"{path}: found no row, expected prompts")
    return list(items.values())


def is_unicode(*texts: str) -> bool:
    """True where no text has a lone surrogate, which JSON's escapes can hold and no tokenizer takes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON Lines file, or of a JSON file that holds a list.

    Raises: DataError when it cannot be read.
    """
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected a JSON or JSON Lines file of prompts") from None
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: found no JSON ({error}), expected one list or an object in each line") from None
    rows = []
    # Not splitlines, which splits at characters that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: found no JSON ({error}), expected an object in each line") from None
    return rows


def _item(row: dict[str, Any], number: int, where: str) -> PromptItem:
    identity = str(next((row[key] for key in _IDS if row.get(key) is not None), number))
    category = row["category"] if isinstance(row.get("category"), str) else None
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return PromptItem(identity, _user(turns[0]), tuple(turns[1:]), category)
    found = next((row[key] for key in ("messages", *_TEXTS) if row.get(key)), None)
    if found is None and isinstance(row.get("chosen"), list):
        # In a pair whose responses repeat the prompt, all turns but the last are the prompt.
        found = row["chosen"][:-1]
    messages = _user(found) if isinstance(found, str) else _messages(found)
    if not messages or messages[-1]["role"] != "user":
        raise DataError(
            f"{where}: found no prompt that ends with a turn of the user, expected messages, turns, or text as prompt"
        )
    return PromptItem(identity, messages, category=category)


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _messages(found: object) -> tuple[Message, ...]:
    """The messages of a list; none where it is not a list of roles and texts."""
    turns = found if isinstance(found, list) else []
    is_sound = all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns) if is_sound else ()
