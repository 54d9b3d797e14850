"""Forms of rows: the columns of a preference file that hold the prompt, the two responses and their context."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records.messages import from_json
from simpo_megatron.data.records.parsing import BadRecord, kind_of

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")

MORE_COMPLETIONS = "more_than_two_completions"

_PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "context", "input")
_SCORES = ("score", "reward", "rating")
_SCORE_KEYS = ("chosen_{}", "chosen-{}", "{}_chosen")

READ_COLUMNS = frozenset(
    {
        *("chosen", "rejected", "chosen_response", "rejected_response", "completions", "completion"),
        *("response1", "response2", "overall_preference", "label", "kto_tag"),
        *(*_PROMPT_COLUMNS, *CONVERSATION_COLUMNS, *SYSTEM_COLUMNS, *MEDIA_COLUMNS, "history", "tools"),
        *("margin", "rating"),
        *(
            pattern.format(score).replace("chosen", side)
            for pattern in _SCORE_KEYS
            for score in _SCORES
            for side in ("chosen", "rejected")
        ),
    }
)
"""Names of all columns that some form of rows reads."""

_MAX_PREFERRED = 3  # HelpSteer3's scale

_BLANKS: tuple[Any, ...] = ("", [])

_TEXT = re.compile(r"\S\s+\S")


@dataclass
class Columns:
    """The columns of one row by their meaning, with unchanged values."""

    row: dict
    chosen: Any
    rejected: Any
    form: str
    """The form that the row was read as, in words."""
    read: set[str]
    """Names of the columns that were read."""
    prompt: Any = None
    prompt_key: str = ""
    conversation: Any = None
    conversation_key: str = ""
    score_gap: float = math.nan
    """By how much the chosen response was scored above the other; nan where nobody scored them."""
    notes: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    """Names of the columns whose messages were read from JSON text."""
    unread: dict[str, Any] = field(default_factory=dict)
    """Keys inside of columns that were read which were not, with what they hold."""

    def take(self, *names: str) -> tuple[str, Any]:
        """Returns the first column of `names` that holds a value, and marks it as read; ("", None) for none.

        Tables have blank cells where a row has no value: one of them counts only where no other column holds one.
        """
        if self.row.keys().isdisjoint(names):
            return "", None
        there = [name for name in names if self.row.get(name) is not None and name not in self.read]
        found = next((name for name in there if self.row[name] not in _BLANKS), there[0] if there else None)
        if found is None:
            return "", None
        self.read.add(found)
        return found, self.row[found]

    def left(self) -> Iterator[tuple[str, Any]]:
        """Yields the columns that hold a value and were not read."""
        return ((key, value) for key, value in self.row.items() if key not in self.read and value is not None)


def pair_columns(row: dict, options: PairOptions) -> Columns:
    """Returns the columns of `row`; their names determine the form.

    Raises: BadRecord: they are not a pair, or the pair is a tie.
    """
    names = options.chosen_column or "chosen", options.rejected_column or "rejected"
    if row.keys().isdisjoint(names):
        if "completions" in row:
            return _ranked(row)
        if {"response1", "response2", "overall_preference"} <= row.keys():
            return _compared(row)
        if row.keys() & {"chosen_response", "rejected_response"}:
            names = "chosen_response", "rejected_response"
        elif _has_label(row):
            detail = "a completion with a label is KTO's data; a pair has a chosen and a rejected one"
            raise BadRecord("unpaired", detail)
    for name, key in zip(("chosen", "rejected"), names, strict=True):
        if key not in row:
            raise missing(row, name, key)
    columns = Columns(row, row[names[0]], row[names[1]], "/".join(names), set(names))
    _find_prompt(columns, options)
    columns.score_gap = _score_gap(columns)
    return columns


def missing(row: dict, name: str, key: str) -> BadRecord:
    """Returns the error for a column that is not there, with the names of those that are."""
    found = ", ".join(sorted(map(str, row))) or "none"
    return BadRecord(f"missing_key:{key}", f"found the columns {found}; {name}_column says which one is meant")


def holds_prompt(response: object) -> bool:
    """Returns whether a response is a conversation that begins with its prompt."""
    if isinstance(response, list) and len(response) > 1 and isinstance(response[0], dict):
        return (response[0].get("role") or response[0].get("from")) not in ("assistant", "gpt")
    return isinstance(response, str) and response.startswith("\n\nHuman:")


def holds_text(value: object) -> bool:
    """Returns whether a value holds words that a model could learn from, not just names, ids or numbers."""
    if isinstance(value, str):
        return _TEXT.search(value) is not None
    if isinstance(value, dict):
        return any(map(holds_text, value.values()))
    return isinstance(value, list) and any(map(holds_text, value))


def _has_label(row: dict) -> bool:
    """Returns whether a row is one response with a label of its own, as KTO's are."""
    if "kto_tag" in row or isinstance(row.get("label"), bool):
        return True
    return "label" in row and not row.keys().isdisjoint(("completion", *CONVERSATION_COLUMNS))


def _find_prompt(columns: Columns, options: PairOptions) -> None:
    row = columns.row
    if options.prompt_column:
        key = columns.prompt_key = options.prompt_column
        if row.get(key) is None:
            raise missing(row, "prompt", key)
        columns.prompt = row[key]
        columns.read.add(key)
        return
    # A response that begins with its prompt needs no other; of other columns only `prompt` says that it is one.
    names: tuple[str, ...] = _PROMPT_COLUMNS[:1] if holds_prompt(columns.chosen) else _PROMPT_COLUMNS
    columns.conversation_key, columns.conversation = columns.take(*CONVERSATION_COLUMNS)
    if columns.conversation in _BLANKS:
        columns.conversation_key, columns.conversation = "", None
    if columns.conversation is not None and row.get("prompt") is None:
        names = ()
    columns.prompt_key, columns.prompt = columns.take(*names)
    if columns.prompt_key == "instruction" and isinstance(columns.prompt, str):
        more = row.get("input")
        if isinstance(more, str):
            # Alpaca's two columns are one question, a line each.
            columns.read.add("input")
            columns.prompt += "\n" + more if more.strip() else ""


def _ranked(row: dict) -> Columns:
    """NeMo-RL's form: a `context`, and `completions` with ranks, of which the lowest is the best."""
    completions = row["completions"]
    if isinstance(completions, str):
        completions = from_json(completions, "completions", "bad_type", "completions")
    if not isinstance(completions, list) or len(completions) < 2:
        found = f"{len(completions)} of them" if isinstance(completions, list) else kind_of(completions)
        raise BadRecord("bad_type:completions", f"completions is {found}, expected a list of at least two")
    for item in completions:
        is_ranked = isinstance(item, dict) and "completion" in item and not math.isnan(_number(item.get("rank")))
        if not is_ranked:
            raise BadRecord("bad_type:completions", "completions holds one without a rank and a completion")
    ordered = sorted(completions, key=lambda item: _number(item["rank"]))
    best, worst = ordered[0], ordered[-1]
    if _number(best["rank"]) == _number(worst["rank"]):
        raise BadRecord("tie", f"all completions have the rank {best['rank']}")
    form = "NeMo-RL completions with ranks"
    columns = Columns(row, best["completion"], worst["completion"], form, {"completions"})
    columns.prompt_key, columns.prompt = columns.take("context", "prompt")
    if len(completions) > 2:
        columns.notes.append(MORE_COMPLETIONS)
    for item in (best, worst):
        others = {key: value for key, value in item.items() if key not in ("rank", "completion") and value is not None}
        columns.unread |= {f"completion key {key}": value for key, value in others.items()}
    return columns


def _compared(row: dict) -> Columns:
    """HelpSteer3's form: two responses and how much the second one is preferred, from -3 to 3."""
    preference = _number(row["overall_preference"])
    if not abs(preference) <= _MAX_PREFERRED:
        found = kind_of(row["overall_preference"]) if math.isnan(preference) else f"{preference:g}"
        detail = f"overall_preference is {found}, expected a number from -{_MAX_PREFERRED} to {_MAX_PREFERRED}"
        raise BadRecord("bad_type:overall_preference", detail)
    if preference == 0:
        raise BadRecord("tie", "overall_preference is 0: neither response is preferred")
    names = ("response1", "response2") if preference < 0 else ("response2", "response1")
    form = "HelpSteer3 responses with overall_preference"
    columns = Columns(row, row[names[0]], row[names[1]], form, {*names, "overall_preference"})
    columns.prompt_key, columns.prompt = columns.take("context", "prompt")
    columns.score_gap = abs(preference)
    return columns


def _score_gap(columns: Columns) -> float:
    row = columns.row
    names = " ".join(map(str, row))
    if not ("score" in names or "reward" in names or "rating" in names or "margin" in row):
        return math.nan
    for name in _SCORES:
        for pattern in _SCORE_KEYS:
            keys = [pattern.format(name), pattern.replace("chosen", "rejected").format(name)]
            found = [_number(row.get(key)) for key in keys]
            if not any(map(math.isnan, found)):
                columns.read.update(keys)
                return found[0] - found[1]
    if not math.isnan(margin := _number(row.get("margin"))):
        columns.read.add("margin")
        return margin
    ratings = row.get("rating")
    if isinstance(ratings, list) and len(ratings) == 2 and not any(math.isnan(_number(rating)) for rating in ratings):
        # Of distilabel: in the order in which the responses were made, the better one was chosen.
        columns.read.add("rating")
        return abs(_number(ratings[0]) - _number(ratings[1]))
    return math.nan


def _number(value: object) -> float:
    """Returns a score, which text files hold as text; nan for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
