"""Preference records: one parsed object in, a prompt and its two responses out, whatever the format."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records.forms import MEDIA_COLUMNS, SYSTEM_COLUMNS, Columns, holds_text, pair_columns
from simpo_megatron.data.records.messages import (
    Message,
    UntrainedTurn,
    as_messages,
    dialogue,
    from_json,
    is_blank,
    is_text_alone,
    to_messages,
    to_tools,
)
from simpo_megatron.data.records.parsing import BadRecord, kind_of
from simpo_megatron.data.records.written_messages import read_written

# Faults of the pair rather than of its text: dropped and counted under any `bad_record`.
UNUSABLE_REASONS = frozenset(
    {"blank_line", "identical_pair", "too_long_prompt", "cut_before_answer", "tie", "small_score_gap", "no_score_gap"}
)

ENDLESS_TEMPLATE = "endless_template"
"""Reason of a record on which the chat template ran without end: no record after it is tried, skipped or not."""

# Roles of turns that may continue a prompt.
_ANSWERING = ("assistant", "tool")

# Unicode noncharacters, refused in records, so they can mark what belongs to whom in a rendered text.
TEMPLATE_MARK, CONTENT_MARK = "\ufdd0", "\ufdd1"
# Lone surrogates have no UTF-8 form.
_BAD_CHARACTER = re.compile(f"[\x00{TEMPLATE_MARK}{CONTENT_MARK}\ud800-\udfff]")


@dataclass(frozen=True)
class Reading:
    """The form a row was read as, and the keys that were not read."""

    form: str = ""
    """In words, such as `chosen/rejected texts with an explicit prompt`."""
    unread: Mapping[str, bool] = field(default_factory=dict)
    """Columns and message keys that were not read, and whether they hold words."""
    score_gap: float = math.nan
    """By how much the chosen response was scored above the other; nan where nobody scored them."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreferenceRecord:
    """One pair; `prompt` is a conversation, or a string that stands for itself.

    A response is its text, or a list of turns if there are several or one is more than text. The turns begin where the
    two responses differ and end with a turn of the assistant. `tools` are the tools that the model could call.
    """

    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    tools: tuple[dict, ...] | None = None
    reading: Reading = field(default_factory=Reading, compare=False)


def to_record(row: dict, options: PairOptions) -> PreferenceRecord:
    """Returns the pair in `row`: string triples, message lists, whole conversations, dialogues, or other known forms.

    Raises: BadRecord, with a reason for each way in which a row can fail to be a pair.
    """
    columns = pair_columns(row, options)
    if not row.keys().isdisjoint(MEDIA_COLUMNS):
        _refuse_media(columns)
    unread = columns.unread
    read_written(columns)
    prompt = columns.prompt
    if prompt is not None:
        prompt = _text_or_messages(prompt, columns.prompt_key, unread)
    chosen = _text_or_messages(columns.chosen, "chosen", unread)
    rejected = _text_or_messages(columns.rejected, "rejected", unread)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord(
            "bad_type:rejected", f"chosen is {kind_of(columns.chosen)} and rejected is {kind_of(columns.rejected)}"
        )
    if columns.conversation is not None:
        prompt = _with_conversation(columns, prompt, chosen, rejected, unread)
    if isinstance(chosen, str) and isinstance(rejected, str):
        kind, record = "texts", _from_texts(prompt, chosen, rejected, options)
    else:
        assert isinstance(chosen, list) and isinstance(rejected, list), "both are text, or neither"
        kind, record = "message lists", _from_messages(prompt, chosen, rejected, options)
    if any(not isinstance(found, str) and len(found) > 1 for found in (record.chosen, record.rejected)):
        kind += ", responses of several turns"
    _check(record, options)
    record, context = _with_context(record, columns, unread)
    reading = _reading(record, columns, kind, context, unread)
    _check_score_gap(reading.score_gap, options)
    # `replace` would take three times as long, for each row.
    return PreferenceRecord(record.prompt, record.chosen, record.rejected, record.tools, reading)


def _refuse_media(columns: Columns) -> None:
    for name in MEDIA_COLUMNS:
        if columns.row.get(name) and name not in columns.read:
            raise BadRecord(f"not_text:{name}", f"the column {name} is not empty; only text is trained on")


def _from_texts(
    prompt: str | list[Message] | None, chosen: str, rejected: str, options: PairOptions
) -> PreferenceRecord:
    if prompt is None:
        if not chosen.startswith("\n\nHuman:"):
            needs = "plain responses need a prompt beside them; prompt_column says which column it is in"
            raise BadRecord("missing_key:prompt", needs)
        return _from_messages(None, dialogue(chosen, "chosen"), dialogue(rejected, "rejected"), options)
    if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
        turns = dialogue(prompt, "prompt")
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
        prompt = turns
    return PreferenceRecord(prompt if isinstance(prompt, str) else tuple(prompt), chosen, rejected)


def _from_messages(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message], options: PairOptions
) -> PreferenceRecord:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            found = f"ends in a turn of {messages[-1]['role']!r}" if messages else "has no message"
            raise BadRecord(f"bad_role:{name}", f"{name} {found}, expected a last turn of 'assistant'")
        if options.responses == "last" and isinstance(messages[-1], UntrainedTurn):
            raise _untrained(name)
    goes_on = all(messages[0]["role"] in _ANSWERING for messages in (chosen, rejected))
    if goes_on and prompt is None:
        raise BadRecord("missing_key:prompt", "chosen begins with an answer, so a prompt is needed beside it")
    if goes_on and len(chosen) == len(rejected) == 1:
        assert prompt is not None, "refused above"
        return PreferenceRecord(
            prompt if isinstance(prompt, str) else tuple(prompt), _response(chosen), _response(rejected)
        )
    if goes_on:
        start = as_messages(prompt or ())
        chosen, rejected = [*start, *chosen], [*start, *rejected]
    most = min(len(chosen), len(rejected)) - 1
    parted = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    if options.responses == "last" and not len(chosen) == len(rejected) == parted + 1:
        raise BadRecord(
            "prompt_mismatch",
            f"chosen and rejected differ before their last turn, from turn {parted} on; responses: assistant trains on "
            "every turn of the assistant from there",
        )
    before = chosen[:parted]
    if not before:
        raise BadRecord("prompt_mismatch", "chosen and rejected share no turn, expected one prompt for both")
    if not goes_on:
        _check_prompt(prompt, before)
    return PreferenceRecord(tuple(before), _response(chosen[parted:]), _response(rejected[parted:]))


def _check_prompt(prompt: str | list[Message] | None, before: list[Message]) -> None:
    """Raises BadRecord when a prompt beside conversations is not in the turns that they share."""
    if isinstance(prompt, str):
        if all(prompt.strip() != message["content"].strip() for message in before):
            raise BadRecord("prompt_mismatch", "the prompt is not a turn of the conversation in chosen")
    elif prompt is not None and prompt != before[: len(prompt)]:
        raise BadRecord("prompt_mismatch", "the prompt is not the beginning of the conversation in chosen")


def _response(turns: list[Message]) -> str | tuple[Message, ...]:
    is_text = len(turns) == 1 and is_text_alone(turns[0]) and not isinstance(turns[0], UntrainedTurn)
    return turns[0]["content"] if is_text else tuple(turns)


def _untrained(name: str) -> BadRecord:
    return BadRecord(f"untrained:{name}", f"no turn of {name} is to be trained on, by its weight, train or loss")


def _with_conversation(
    columns: Columns,
    prompt: str | list[Message] | None,
    chosen: str | list[Message],
    rejected: str | list[Message],
    unread: dict[str, Any],
) -> str | list[Message] | None:
    """Returns the prompt from a column that holds a conversation and from the row's other columns."""
    key = columns.conversation_key
    turns = _text_or_messages(columns.conversation, key, unread)
    if isinstance(turns, str):
        raise BadRecord(f"bad_type:{key}", f"{key} is a string, expected a list of messages")
    if turns in (chosen, rejected):
        return prompt  # as UltraFeedback's `messages`, which repeat the chosen conversation
    answers = [response if isinstance(response, str) else response[-1]["content"] for response in (chosen, rejected)
               if response]  # fmt: skip
    if len(turns) > 1 and turns[-1]["role"] == "assistant" and turns[-1]["content"] in answers:
        turns = turns[:-1]
    is_same = prompt == turns or (isinstance(prompt, str) and turns and prompt.strip() == turns[-1]["content"].strip())
    if prompt is not None and not is_same:
        raise BadRecord(
            "prompt_mismatch",
            f"{columns.prompt_key} is not the end of {key}, expected one prompt; prompt_column says which is meant",
        )
    return turns


def _with_context(
    record: PreferenceRecord, columns: Columns, unread: dict[str, Any]
) -> tuple[PreferenceRecord, list[str]]:
    """Returns the record with its row's history, system turn and tools, and the names of those it has."""
    context, turns = [], None if isinstance(record.prompt, str) else list(record.prompt)
    name, history = columns.take("history")
    if not is_blank(history):
        turns = list(as_messages(record.prompt)) if turns is None else turns
        start = 1 if turns[0]["role"] == "system" else 0
        earlier = _history(history, unread)
        if turns[start : start + len(earlier)] != earlier:
            turns[start:start] = earlier
        context.append(name)
    name, system = _system(columns)
    if system:
        turns = list(as_messages(record.prompt)) if turns is None else turns
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        elif turns[0]["content"].strip() != system.strip():
            raise BadRecord("system_mismatch", f"the column {name} and the conversation's system turn differ")
        context.append(name)
    name, tools = columns.take("tools")
    found = to_tools(tools)
    context += [name] if found else []
    if not context:
        return record, context
    _refuse_bad_characters([turns or [], list(found or [])])
    return replace(record, prompt=record.prompt if turns is None else tuple(turns), tools=found), context


def _system(columns: Columns) -> tuple[str, str]:
    """Returns the name and the text of the row's system column, which is empty where there is none."""
    found: dict[str, str] = {}
    while (taken := columns.take(*SYSTEM_COLUMNS))[0]:
        name, system = taken
        if not isinstance(system, str):
            raise BadRecord(f"bad_type:{name}", f"{name} is {kind_of(system)}, expected a string")
        if system.strip():
            found[name] = system
    if len({text.strip() for text in found.values()}) > 1:
        raise BadRecord("system_mismatch", f"the columns {' and '.join(found)} differ, expected one system turn")
    return next(iter(found.items()), ("", ""))


def _history(history: object, unread: dict[str, Any]) -> list[Message]:
    """Returns earlier turns, from messages or from LLaMA-Factory's pairs of a question and an answer."""
    history = from_json(history, "history", "bad_type", "history")
    if not all(isinstance(item, list) for item in history):
        return to_messages(history, "history", unread)
    turns = []
    for item in history:
        if len(item) != 2 or not all(isinstance(text, str) for text in item):
            raise BadRecord("bad_type:history", "history holds what is no pair of a question and an answer")
        turns += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
    return turns


def _reading(
    record: PreferenceRecord, columns: Columns, kind: str, context: list[str], unread: dict[str, Any]
) -> Reading:
    keys = [key for key in (columns.conversation_key, columns.prompt_key) if key]
    if columns.prompt_key == "instruction" and "input" in columns.read:
        keys.append("input")
    form = _form(columns.form, kind, tuple(keys), tuple(context), tuple(columns.written))
    words = {key: holds_text(value) for key, value in unread.items()}
    if left := list(columns.left()):
        known = {text.strip() for text in (record.prompt, record.chosen, record.rejected) if isinstance(text, str)}
        for key, value in left:
            is_known = isinstance(value, str) and value.strip() in known
            words[str(key)] = not is_known and holds_text(value)
    return Reading(form, words, columns.score_gap, tuple(columns.notes))


@lru_cache(maxsize=1024)
def _form(columns: str, kind: str, keys: Sequence[str], context: Sequence[str], written: Sequence[str]) -> str:
    """Returns the form of a row in words; most rows of a file have the same."""
    where = "the prompt inside" if not keys else "an explicit prompt"
    if keys not in ((), ("prompt",)):
        where = f"the prompt in {' and '.join(keys)}"
    form = f"{columns}{'' if '/' in columns.split()[0] else ','} {kind} with {', '.join([where, *context])}"
    return f"{form}; {' and '.join(written)} from JSON text" if written else form


def _check(record: PreferenceRecord, options: PairOptions) -> None:
    messages = () if isinstance(record.prompt, str) else record.prompt
    prompt_texts = [record.prompt] if isinstance(record.prompt, str) else [m["content"] for m in messages]
    _refuse_bad_characters((record.prompt, record.chosen, record.rejected))
    both = record.chosen, record.rejected
    if (
        messages
        and messages[-1]["role"] == "assistant"
        and any(isinstance(response, str) or response[0]["role"] == "assistant" for response in both)
    ):
        raise BadRecord("bad_role:prompt", "the prompt ends in a turn of 'assistant', expected one of 'user'")
    if not options.allow_empty_prompt and not any(text.strip() for text in prompt_texts):
        raise BadRecord("empty_prompt", "the prompt is empty; allow_empty_prompt allows it")
    said = [_said(response, name) for response, name in zip(both, ("chosen", "rejected"), strict=True)]
    if said[0] == said[1]:
        raise BadRecord("identical_pair", "chosen and rejected are the same text")


def _said(response: str | Sequence[Message], name: str) -> list[Message]:
    """Returns the turns of the assistant, without blanks around their texts; an empty one is refused."""
    if isinstance(response, str) and (text := response.strip()):
        return [{"role": "assistant", "content": text}]  # as most are
    written = [turn for turn in as_messages(response, "assistant") if turn["role"] == "assistant"]
    if all(isinstance(turn, UntrainedTurn) for turn in written):
        raise _untrained(name)
    said = [{**turn, "content": turn["content"].strip()} for turn in written]
    if any(is_text_alone(turn) and not turn["content"] for turn in said):
        raise BadRecord(f"empty_{name}", f"the {name} response is empty")
    return said


def _check_score_gap(gap: float, options: PairOptions) -> None:
    least = options.min_score_gap
    if least is None:
        return
    if math.isnan(gap):
        raise BadRecord("no_score_gap", "the record has no scores of its responses, which min_score_gap needs")
    if gap < least:
        raise BadRecord("small_score_gap", f"the scores are {gap:g} apart, expected min_score_gap {least:g}")


def _refuse_bad_characters(value: object) -> None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            if item.isascii() and "\x00" not in item:
                continue  # most texts, seen without a look at each letter
            if found := _BAD_CHARACTER.search(item):
                raise BadRecord("bad_character", f"U+{ord(found.group()):04X} cannot stand in training text")
        elif isinstance(item, (list, tuple)):
            left.extend(item)
        elif isinstance(item, dict):
            left.extend(map(str, item))
            left.extend(item.values())


def _text_or_messages(value: object, name: str, unread: dict[str, Any]) -> str | list[Message]:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRecord(f"bad_type:{name}", f"{name} is {kind_of(value)}, expected a string or a list of messages")
    return to_messages(value, name, unread)
