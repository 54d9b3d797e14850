"""Preference records: one parsed object in, a prompt and its two responses out, whatever the format."""

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from simpo_megatron.data.pair_options import PairOptions

Message = dict[str, str]

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool",
}  # fmt: skip
KNOWN_KEYS = frozenset({"prompt", "conversations", "chosen", "rejected"})
# What is wrong with the pair rather than with its text: dropped and counted whatever `bad_record` says.
UNUSABLE_REASONS = frozenset({"blank_line", "identical_pair", "too_long_prompt"})

_DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")
# Two noncharacters are this package's own marks (see templates.py); lone surrogates have no UTF-8 form.
_BAD_CHARACTER = re.compile("[\x00\ufdd0\ufdd1\ud800-\udfff]")


class BadRecord(Exception):
    """A record that is no pair; `reason` is a short name that is counted, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class PreferenceRecord:
    """One pair as text; `prompt` is a conversation, or a string that stands for itself."""

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str


def parse_json(raw: bytes, last_line: bool = False) -> dict:
    """Returns the JSON object of one line.

    Raises: BadRecord for text that is not UTF-8, not JSON, not an object, or that names a key twice.
    """
    text = _decode(raw)
    if not text.strip():
        raise BadRecord("blank_line", "the line is blank")
    if text.startswith("\ufeff"):
        raise BadRecord("byte_order_mark", "a byte order mark stands inside the file")
    row = _parse(text, "truncated_json" if last_line else "bad_json")
    return check_row(row)


def parse_json_array(raw: bytes) -> list:
    """Returns the rows of a JSON file that holds one list of objects.

    Raises: BadRecord as `parse_json`, and when the file does not hold a list.
    """
    rows = _parse(_decode(raw.removeprefix(b"\xef\xbb\xbf")), "bad_json")
    if not isinstance(rows, list):
        raise BadRecord("not_a_list", f"the file holds {_kind(rows)}, expected a list of objects")
    return rows


def check_row(row: object) -> dict:
    """Returns `row`. Raises: BadRecord when it is not an object with named columns."""
    if not isinstance(row, dict):
        raise BadRecord("not_an_object", f"found {_kind(row)}, expected an object with `chosen` and `rejected`")
    return row


def extra_keys(row: dict, options: PairOptions) -> set[str]:
    """Returns the names of the columns that are not read."""
    return set(row) - KNOWN_KEYS - {options.prompt_column, options.chosen_column, options.rejected_column}


def to_record(row: dict, options: PairOptions) -> PreferenceRecord:
    """Returns the pair in `row`: string triples, message lists, whole conversations, dialogues or sharegpt.

    Raises: BadRecord, with a reason for each way in which a row can fail to be a pair.
    """
    if "completion" in row and "label" in row and "chosen" not in row:
        raise BadRecord("unpaired", "a completion with a label is KTO's data; a pair has a chosen and a rejected one")
    chosen = _column(row, "chosen", options.chosen_column)
    rejected = _column(row, "rejected", options.rejected_column)
    prompt_key = options.prompt_column or ("conversations" if row.get("prompt") is None else "prompt")
    prompt = row.get(prompt_key)
    if options.prompt_column and prompt is None:
        raise _missing(row, "prompt", prompt_key)
    if prompt is not None:
        prompt = _text_or_messages(prompt, prompt_key)
    chosen = _text_or_messages(chosen, "chosen")
    rejected = _text_or_messages(rejected, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        record = _from_texts(prompt, chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        record = _from_messages(prompt, chosen, rejected)
    else:
        raise BadRecord("bad_type:rejected", f"chosen is {_kind(chosen)} and rejected is {_kind(rejected)}")
    return _checked(record, options)


def _from_texts(prompt: str | list[Message] | None, chosen: str, rejected: str) -> PreferenceRecord:
    if prompt is None:
        if not chosen.startswith("\n\nHuman:"):
            needs = "plain responses need a prompt beside them; prompt_column says which column it is in"
            raise BadRecord("missing_key:prompt", needs)
        return _from_messages(None, _dialogue(chosen, "chosen"), _dialogue(rejected, "rejected"))
    if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
        turns = _dialogue(prompt, "prompt")
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
        prompt = turns
    return PreferenceRecord(prompt if isinstance(prompt, str) else tuple(prompt), chosen, rejected)


def _from_messages(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> PreferenceRecord:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            found = f"ends in a turn of {messages[-1]['role']!r}" if messages else "has no message"
            raise BadRecord(f"bad_role:{name}", f"{name} {found}, expected a last turn of 'assistant'")
    answers = chosen[-1]["content"], rejected[-1]["content"]
    before, before_rejected = chosen[:-1], rejected[:-1]
    if before != before_rejected:
        turn = next((i for i, (a, b) in enumerate(zip(before, before_rejected, strict=False)) if a != b),
                    min(len(before), len(before_rejected)))  # fmt: skip
        raise BadRecord("prompt_mismatch", f"chosen and rejected differ before their last turn, from turn {turn} on")
    if not before:
        if prompt is None:
            raise BadRecord("missing_key:prompt", "chosen holds one message, so a prompt is needed beside it")
        return PreferenceRecord(prompt if isinstance(prompt, str) else tuple(prompt), *answers)
    if isinstance(prompt, str):
        if all(prompt.strip() != message["content"].strip() for message in before):
            raise BadRecord("prompt_mismatch", "the prompt is not a turn of the conversation in chosen")
    elif prompt is not None and prompt != before:
        raise BadRecord("prompt_mismatch", "the prompt is not the beginning of the conversation in chosen")
    return PreferenceRecord(tuple(before), *answers)


def _checked(record: PreferenceRecord, options: PairOptions) -> PreferenceRecord:
    messages = () if isinstance(record.prompt, str) else record.prompt
    prompt_texts = [record.prompt] if isinstance(record.prompt, str) else [m["content"] for m in messages]
    for text in (*prompt_texts, record.chosen, record.rejected):
        if found := _BAD_CHARACTER.search(text):
            raise BadRecord("bad_character", f"U+{ord(found.group()):04X} cannot stand in training text")
    if messages and messages[-1]["role"] == "assistant":
        raise BadRecord("bad_role:prompt", "the prompt ends in a turn of 'assistant', expected one of 'user'")
    if not options.allow_empty_prompt and not any(text.strip() for text in prompt_texts):
        raise BadRecord("empty_prompt", "the prompt is empty; allow_empty_prompt allows it")
    if not record.chosen.strip():
        raise BadRecord("empty_chosen", "the chosen response is empty")
    if not record.rejected.strip():
        raise BadRecord("empty_rejected", "the rejected response is empty")
    if record.chosen.strip() == record.rejected.strip():
        raise BadRecord("identical_pair", "chosen and rejected are the same text")
    return record


def _column(row: dict, name: str, mapped: str) -> Any:
    key = mapped or name
    if key not in row:
        raise _missing(row, name, key)
    return row[key]


def _missing(row: dict, name: str, key: str) -> BadRecord:
    found = ", ".join(sorted(row)) or "none"
    return BadRecord(f"missing_key:{key}", f"found the columns {found}; {name}_column says which one is meant")


def _text_or_messages(value: object, name: str) -> str | list[Message]:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRecord(f"bad_type:{name}", f"{name} is {_kind(value)}, expected a string or a list of messages")
    return [_message(item, name) for item in value]


def _message(item: object, name: str) -> Message:
    if not isinstance(item, dict):
        raise BadRecord(f"bad_type:{name}", f"{name} holds {_kind(item)} where a message is expected")
    role, content = (
        (item.get("role"), item.get("content")) if item.get("role") else (item.get("from"), item.get("value"))
    )
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRecord(
            f"bad_type:{name}", f"{name} holds a message without text in role and content (or from and value)"
        )
    if role not in ROLES:
        raise BadRecord(f"bad_role:{name}", f"{name} holds a turn of {role!r}, expected one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": content}


def _dialogue(text: str, name: str) -> list[Message]:
    """Returns the turns of a text like `\\n\\nHuman: Hi\\n\\nAssistant: Hi`, without blanks around them."""
    before, *parts = _DIALOGUE_TURN.split(text)
    if before or not parts:
        raise BadRecord(f"bad_dialogue:{name}", f"{name} does not begin with a blank line and `Human:`")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": content.strip()} for speaker, content in turns]


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} of the record is 0x{raw[error.start]:02x}"
        raise BadRecord("invalid_utf8", f"{found}; convert the file to UTF-8") from None


def _parse(text: str, reason: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRecord(reason, str(error) or type(error).__name__) from None


def _unique_keys(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRecord("duplicate_key", f"the key {twice!r} stands twice in one object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}.get(type(value), "a number")
