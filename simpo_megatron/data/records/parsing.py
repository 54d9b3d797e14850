"""JSON of preference files: parses one object per line, or refuses the line with a reason."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn


class BadRecord(Exception):
    """A record that is not a valid pair; `reason` is a short name for the counts, `detail` what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Unreadable:
    """A cell of a table that Python cannot represent."""

    why: str


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
        raise BadRecord("not_a_list", f"the file holds {kind_of(rows)}, expected a list of objects")
    return rows


def check_row(row: object) -> dict:
    """Returns `row`. Raises: BadRecord when it is not an object with named columns."""
    if not isinstance(row, dict):
        raise BadRecord("not_an_object", f"found {kind_of(row)}, expected an object with `chosen` and `rejected`")
    return row


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} of the record is 0x{raw[error.start]:02x}"
        raise BadRecord("invalid_utf8", f"{found}; convert the file to UTF-8") from None


def _parse(text: str, reason: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(reason, str(error) or type(error).__name__) from None


def _unique_keys(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRecord("duplicate_key", f"the key {twice!r} stands twice in one object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Made once: a decoder for each of many short lines would take as long as they do.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def kind_of(value: object) -> str:
    """Returns the type of a JSON value, in words."""
    if value is None:
        return "null"
    if isinstance(value, Unreadable):
        return f"an unreadable value ({value.why})"
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
