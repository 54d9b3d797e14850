"""Messages of every dialect in one form: `role`, `content` and the other keys that templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from simpo_megatron.data.records.parsing import BadRecord, kind_of

Message = dict[str, Any]
"""One turn as templates read it: `role`, `content` and, where the turn has them, the keys of EXTRA_KEYS."""

EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys that a turn may hold beside its role and its text."""


class UntrainedTurn(dict[str, Any]):
    """A Message of the assistant that its file asks not to train on; told from others by its type."""


ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "ai": "assistant", "bot": "assistant",
    "chatbot": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
"""The name of each role here, by its name in lower case; a role that is not here is refused."""

_PLAIN_KEYS, _PLAIN_ROLES = {"role", "content"}, ("user", "assistant", "system", "tool")
# LLaMA-Factory's and GLM's name for a turn whose text is the call itself, in JSON.
_CALL_ROLES = ("function_call", "tool_call")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CALL_KEYS = ("id", "type", "index", "function")
_TEXT_PARTS = ("text", "input_text", "output_text")
_READ_KEYS = frozenset({"role", "from", "content", "value", "function_call", *EXTRA_KEYS, *_REASONING_KEYS})
# OpenAI's, Axolotl's and SWIFT's keys for whether a turn is trained on, with their values for yes and no.
_WEIGHT_KEYS = {"weight": (1, 0), "train": (True, False), "loss": (True, False)}
_DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")


def to_messages(value: list, name: str, unread: dict[str, Any]) -> list[Message]:
    """Returns the turns of `value`, the column `name`; keys that are not read go to `unread`, with their values.

    Raises: BadRecord for what is no message, an unknown role, or content that is not text.
    """
    return [_message(item, name, unread) for item in value]


def as_messages(text: str | Sequence[Message], role: str = "user") -> tuple[Message, ...]:
    """Returns the conversation that a prompt or a response stands for; a string is one turn of `role`."""
    return ({"role": role, "content": text},) if isinstance(text, str) else tuple(text)


def is_text_alone(message: Message) -> bool:
    """Returns whether a turn has only a role and a text."""
    return len(message) == 2


def is_written_message(value: object) -> bool:
    """Returns whether an object that was read from JSON is a message: it has a role, and what was said."""
    if not isinstance(value, dict) or not isinstance(value.get("role") or value.get("from"), str):
        return False
    return not value.keys().isdisjoint(("content", "value", "tool_calls", "function_call", *_REASONING_KEYS))


def dialogue(text: str, name: str) -> list[Message]:
    """Returns the turns of a text like `\\n\\nHuman: Hi\\n\\nAssistant: Hi`, without blanks around them."""
    before, *parts = _DIALOGUE_TURN.split(text)
    if before or not parts:
        raise BadRecord(f"bad_dialogue:{name}", f"{name} does not begin with a blank line and `Human:`")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": content.strip()} for speaker, content in turns]


def _message(item: object, name: str, unread: dict[str, Any]) -> Message:
    if not isinstance(item, dict):
        raise BadRecord(f"bad_type:{name}", f"{name} holds {kind_of(item)} where a message is expected")
    if item.keys() == _PLAIN_KEYS and isinstance(item["content"], str) and item["role"] in _PLAIN_ROLES:
        return {"role": item["role"], "content": item["content"]}  # as most are
    said = "role" if item.get("role") else "from"
    role, called = _role(item.get(said), name)
    text = "content" if item.get("content") is not None else "value"
    content, thoughts = _content(item.get(text), name, unread)
    extra = _extra(item, name, thoughts)
    if called:
        if "tool_calls" in extra:
            raise BadRecord(f"bad_calls:{name}", f"{name} holds a turn that is a call and has tool_calls, expected one")
        extra["tool_calls"], content = _written_calls(content, name), ""
    for call in extra.get("tool_calls", ()):
        _name_unread("call", call, _CALL_KEYS if "function" in call else ("name", "arguments", *_CALL_KEYS), unread)
    if content is None:
        if not extra.keys() & {"tool_calls", "reasoning_content"}:
            raise BadRecord(
                f"bad_type:{name}", f"{name} holds a message without text in role and content (or from and value)"
            )
        content = ""
    for key, value in item.items():
        # The other dialect's keys are read too, where one table has both and fills the one with nulls.
        is_read = key in _READ_KEYS and (key in (said, text) or key not in ("role", "from", "content", "value"))
        # Turns of other roles are never trained on.
        is_read |= key in _WEIGHT_KEYS and (role == "assistant" or not value)
        if not is_read and value is not None:
            unread.setdefault(f"message key {key}", value)
    turn = {"role": role, "content": content, **extra}
    return turn if role != "assistant" or _is_trained(item, name) else UntrainedTurn(turn)


def _is_trained(item: Mapping[str, Any], name: str) -> bool:
    answers = set()
    for key, values in _WEIGHT_KEYS.items():
        value = item.get(key)
        if value is not None and (not isinstance(value, (int, float)) or value not in values):
            raise BadRecord(
                f"bad_weight:{name}",
                f"{name} holds a turn with {key} {str(value)[:40]!r}, expected {values[0]} or {values[1]}",
            )
        answers |= set() if value is None else {bool(value)}
    if len(answers) > 1:
        raise BadRecord(f"bad_weight:{name}", f"{name} holds a turn whose weight, train and loss do not agree")
    return answers != {False}


def _role(role: object, name: str) -> tuple[str, bool]:
    """Returns the role by its name here, and whether its text is a call."""
    if not isinstance(role, str):
        raise BadRecord(
            f"bad_type:{name}", f"{name} holds a message without text in role and content (or from and value)"
        )
    plain = role.strip().lower()
    if plain in _CALL_ROLES:
        return "assistant", True
    if plain not in ROLES:
        raise BadRecord(
            f"bad_role:{name}",
            f"{name} holds a turn of {role[:40]!r}, expected one of {', '.join((*ROLES, *_CALL_ROLES))}",
        )
    return ROLES[plain], False


def _content(content: object, name: str, unread: dict[str, Any]) -> tuple[str | None, str]:
    """Returns the text of a turn and the reasoning that stands among its parts."""
    if content is None or isinstance(content, str):
        return content, ""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadRecord(f"bad_type:{name}", f"{name} holds content that is {kind_of(content)}, expected text")
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type") or ("text" if "text" in part else None) if isinstance(part, dict) else "text"
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            raise BadRecord(f"bad_type:{name}", f"{name} holds a part that is {kind_of(part)}, expected text")
        elif kind == "thinking" and isinstance(part.get("thinking"), str):
            _name_unread("part", part, ("type", "thinking"), unread)
            thoughts.append(part["thinking"])
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            _name_unread("part", part, ("type", "text"), unread)
            texts.append(part["text"])
        elif kind in (None, *_TEXT_PARTS):
            keys = ", ".join(map(str, part))[:80] or "none"
            raise BadRecord(f"not_text:{name}", f"{name} holds content with the keys {keys}, expected a text in `text`")
        else:
            raise BadRecord(f"not_text:{name}", f"{name} holds a part of type {str(kind)[:40]!r}, expected text alone")
    return "".join(texts), "".join(thoughts)


def _name_unread(what: str, item: Mapping[str, Any], read: tuple[str, ...], unread: dict[str, Any]) -> None:
    for key, value in item.items():
        if key not in read and value is not None:
            unread.setdefault(f"{what} key {key}", value)


def _extra(item: Mapping[str, Any], name: str, thoughts: str) -> Message:
    extra: Message = {}
    calls = item.get("tool_calls")
    if item.get("function_call"):
        if calls:
            raise BadRecord(f"bad_calls:{name}", f"{name} holds both tool_calls and function_call, expected one")
        calls = [{"type": "function", "function": call}
                 for call in from_json(item["function_call"], name, "bad_calls", "function_call")]  # fmt: skip
    if calls:
        extra["tool_calls"] = [_call(call, name) for call in from_json(calls, name, "bad_calls", "tool_calls")]
    for key in ("tool_call_id", "name"):
        if item.get(key) is not None:
            if not isinstance(item[key], str):
                raise BadRecord(f"bad_type:{name}", f"{name} holds a {key} that is {kind_of(item[key])}, expected text")
            extra[key] = item[key]
    found = [text for text in (thoughts, *(item.get(key) for key in _REASONING_KEYS)) if text]
    if not all(isinstance(text, str) and text == found[0] for text in found):
        raise BadRecord(f"bad_reasoning:{name}", f"{name} holds two reasonings of one turn, or one that is no text")
    if found:
        extra["reasoning_content"] = found[0]
    return extra


def _call(call: object, name: str) -> dict:
    """Returns a call with its arguments as an object, as templates are documented to get them.

    Source: huggingface/transformers, docs of tool use: the arguments of a call in a message are a dict, not a string.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f"bad_calls:{name}", f"{name} holds a call without the name of a function")
    if any(isinstance(call.get(key), (dict, list)) for key in _CALL_KEYS if key != "function"):
        raise BadRecord(f"bad_calls:{name}", f"{name} holds a call with an id or a type that is no text")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            function = {**function, "arguments": parsed}
    return {**call, "function": function} if "function" in call else function


def _written_calls(content: str | None, name: str) -> list[dict]:
    return [_call(call, name) for call in from_json(content, name, "bad_calls", "a turn that is a call")]


def to_tools(value: object) -> tuple[dict, ...] | None:
    """Returns the tools of a row, from a list of objects or its JSON text; None for none.

    Raises: BadRecord for anything else.
    """
    if is_blank(value):
        return None
    tools = from_json(value, "tools", "bad_type", "tools")
    tools = [from_json(tool, "tools", "bad_type", "a tool")[0] if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools):
        raise BadRecord("bad_type:tools", "tools holds what is no object, expected JSON schemas of functions")
    return tuple(tools) or None


def is_blank(value: object) -> bool:
    """Returns whether a cell of a table holds nothing: it is empty, or an empty list or null in JSON."""
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def from_json(value: object, name: str, reason: str, what: str) -> list:
    """Returns the list in `value`, from its JSON text where it is one; an object becomes a list of one.

    Raises: BadRecord `reason`:`name` for anything else, and for an empty list.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{reason}:{name}", f"{name}: {what} is no JSON: {error}") from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{reason}:{name}", f"{name}: {what} is {kind_of(value)}, expected a list of objects")
    return value


def says_more(turn: Message) -> bool:
    """Returns whether a turn calls a tool or has a reasoning beside its text."""
    return any(turn.get(key) for key in ("tool_calls", "reasoning_content"))
