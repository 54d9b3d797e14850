"""Files of one line per result, so that a stopped process can continue."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeGuard

from simpo_megatron import atomic
from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.limits import read_bounded

_MAX_SHOWN = 60
MAX_BYTES = 1 << 30
"""Size of the largest file of prompts, answers or scores that is read."""


def read_lines(path: Path, **fields: type) -> list[dict[str, Any]]:
    """The objects in a JSON Lines file, without an incomplete last line; none where there is no file.

    Args:
        fields: names that each object has, and the types of their values.

    Raises: DataError for any other line that is not such an object, and when the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        whole, _, _ = read_bounded(path, MAX_BYTES).decode("utf-8").rpartition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected a JSON Lines file") from None
    rows = []
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: found no JSON object, expected one in each line; remove the line")
        wrong = [name for name, kind in fields.items() if type(row.get(name)) is not kind]
        if wrong:
            raise DataError(
                f"{path}:{number}: {wrong[0]}: found {str(row.get(wrong[0]))[:80]!r}, expected a value of type "
                f"{fields[wrong[0]].__name__}; remove the line"
            )
        rows.append(row)
    return rows


@contextmanager
def appending(path: Path) -> Iterator[IO[str]]:
    """`path`, open to append lines, with an incomplete last one removed."""
    with path.open("a+b") as raw:
        raw.seek(0)
        raw.truncate(raw.read().rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        yield file


def append(file: IO[str], row: Mapping[str, Any]) -> None:
    """Writes `row` as a line, and flushes it."""
    # Lone surrogates, which a model may write, exist in JSON's escapes and not in UTF-8.
    file.write(json.dumps(row) + "\n")
    file.flush()


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Makes the folder, and locks it for this process within the context.

    Raises: ConfigError when another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = atomic.lock(folder / atomic.LOCK_FILE)
    except BlockingIOError:
        raise ConfigError(
            f"out: found {folder} in use by another process, expected a folder of this one's own"
        ) from None
    except OSError as error:
        raise ConfigError(f"out: found {folder}, which cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        held.release()


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes `settings` into `path`, or compares them with those in it.

    Raises: ConfigError naming each setting that differs from those in the folder.
    """
    now = json.loads(json.dumps(settings))
    if path.exists():
        before = read_settings(path)
        changed = [
            f"{name} {_shown(before.get(name))} before, {_shown(now.get(name))} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ConfigError(
                f"out: found {path.parent}, begun with other settings ({'; '.join(changed)}), expected the same; "
                "continue with those or name another folder"
            )
        return
    write_record(path, {"settings": now})


def _shown(value: Any) -> str:
    """The value, its middle left out where it is long: a prompt, or a hash."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]} ... {text[-_MAX_SHOWN // 2 :]}"


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in the record `path`.

    Raises: ConfigError when it is not such a record.
    """
    settings = (read_record(path) or {}).get("settings")
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: found no settings in it, expected the record of a folder; name another folder")
    return settings


def is_finite_number(value: object) -> TypeGuard[float]:
    """True for a number that is neither a boolean, nor NaN, nor outside the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_record(path: Path) -> dict[str, Any] | None:
    """The object in the JSON file `path`; None where it is no such file."""
    try:
        record = json.loads(read_bounded(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes `record` as the whole file, atomically."""
    atomic.write_text(path, json.dumps(record, indent=1) + "\n")
