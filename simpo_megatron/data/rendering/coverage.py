"""Checks that a rendered text contains its conversation: turns, reasoning, calls and tools, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simpo_megatron.data.records import BadRecord, Message
from simpo_megatron.data.rendering.findings import split_reasoning

_ANYWHERE = ("system", "developer")
"""Roles whose turn some templates move: into the first turn of the user, or into the last."""


def check_conversation(rendered: str, turns: Sequence[Message], tools: Sequence[dict] | None) -> set[str]:
    """Returns the findings about the turns of a rendered prompt.

    Raises: BadRecord template_leaves_out, where a turn, a call or a tool is not in the text.
    """
    findings: set[str] = set()
    for tool in tools or ():
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in rendered:
            raise _left_out(f"the tool {name}")
    position = 0
    for turn in turns:
        start = 0 if turn["role"] in _ANYWHERE else position
        end, found = check_turn(rendered, start, turn)
        position = max(position, end)
        findings |= {"history_reasoning_left_out" if name == "reasoning_left_out" else name for name in found}
    return findings


def check_turn(rendered: str, start: int, turn: Message) -> tuple[int, set[str]]:
    """Returns where the turn's text ends in `rendered`, looked for from `start`, and the findings about it.

    A missing reasoning is the finding reasoning_left_out; the caller decides what it means.

    Raises: BadRecord template_leaves_out, where the rest of the turn is not in the text.
    """
    content, findings = turn["content"], set()
    reasoning = turn.get("reasoning_content")
    end = start
    if isinstance(reasoning, str) and reasoning.strip():
        found = _find(rendered, start, reasoning.strip())
        if found is None:
            findings.add("reasoning_left_out")
        else:
            end = found[0] if content.strip() else start
    if content.strip():
        end, about_content = _find_content(rendered, end, turn["role"], content)
        findings |= about_content
    for call in turn.get("tool_calls") or ():
        for text in _leaves(call.get("function", call) if isinstance(call, Mapping) else call):
            if _find(rendered, start, text) is None:
                raise _left_out(f"{_shown(text)} of a call")
    return end, findings


def _find_content(rendered: str, start: int, role: str, content: str) -> tuple[int, set[str]]:
    text = content.strip()
    found = _find(rendered, start, text)
    if found is not None:
        end, is_literal = found
        whole = text == content or rendered.find(content, start) >= 0
        return end, (set() if whole else {"blanks_left_out"}) if is_literal else {"text_rewritten"}
    reasoning, answer = split_reasoning(content)
    if reasoning:
        found = _find(rendered, start, reasoning)
        middle = start if found is None else found[0]
        behind = _find(rendered, middle, answer) if answer else (middle, True)
        if behind is not None:
            return behind[0], {"reasoning_left_out"} if found is None else set()
    raise _left_out(f"{_shown(content)}, a turn of {role}")


def _find(rendered: str, start: int, text: str) -> tuple[int, bool] | None:
    """Returns (end, whether it is unchanged) of `text` in `rendered` from `start` on."""
    at = rendered.find(text, start)
    if at >= 0:
        return at + len(text), True
    for form in (json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]):
        at = rendered.find(form, start)
        if at >= 0:
            return at + len(form), True
    wanted = "".join(letter for letter, _ in _letters(text))
    letters = list(_letters(rendered[start:]))
    at = "".join(letter for letter, _ in letters).find(wanted)
    return None if at < 0 or not wanted else (start + letters[at + len(wanted) - 1][1] + 1, False)


def _letters(text: str) -> Iterator[tuple[str, int]]:
    """Yields each letter that is no blank, in lower case, with its place."""
    for place, letter in enumerate(text):
        if not letter.isspace():
            for small in letter.casefold():
                yield small, place


def _leaves(value: Any) -> Iterator[str]:
    """Yields the texts of a call's name and arguments; arguments may be JSON in a string."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, (dict, list)):
            yield from _leaves(parsed)
        elif value.strip():
            yield value.strip()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _left_out(what: str) -> BadRecord:
    return BadRecord("template_leaves_out", f"the chat template leaves out {what}; give another chat_template")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
