"""Raw records of a preference file, one by one, whatever kind of file it is."""

from __future__ import annotations

import csv
import glob
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import BadRecord, parse_json, parse_json_array
from simpo_megatron.data.sources.column_files import arrow_rows, parquet_rows, without_nulls
from simpo_megatron.data.sources.shards import COMPRESSIONS, HF_PREFIX, HUB_PREFIX, files_of, is_on_hub, plain_name
from simpo_megatron.errors import DataError, listed

_LINES_LOOKED_AT = 5
_MAX_BYTES_READ_TWICE = 64 << 20


@dataclass(frozen=True)
class RawRecord:
    """One record before parsing: a JSON line, a parsed row, an error, or None if it is too long.

    `line` counts from 1: of text the line where the record begins, of tables and lists the record.
    """

    line: int
    row: bytes | dict | BadRecord | None
    last: bool = False


def read_raw(path: str, options: PairOptions) -> Iterator[RawRecord]:
    """Yields the raw records of `path`, in file order, holding a few of them (of a list in JSON, all).

    Raises: DataError: the file cannot be read, or its content does not match its name.
    """
    for file in files_of(path):
        if is_on_hub(file):
            yield from _read_hub(file, options)
        elif os.path.isdir(file):
            yield from _read_saved_dataset(file)
        else:
            yield from _read_file(file, options)


def check_kind(path: str) -> None:
    """Returns if the local files of `path` are of kinds that are read; of text only the first lines are looked at.

    Raises: DataError: one is not.
    """
    for _ in _local_files(path, PairOptions()):
        pass


def first_records(path: str, options: PairOptions) -> Iterator[tuple[str, RawRecord | None]]:
    """Yields each file of `path` that is here, and its first record, None where it has none.

    Of a large list in JSON or table of parquet, which take long to begin, only the kind is looked at.

    Raises: DataError: a file is of a kind that is not read, or damaged.
    """
    for file, records in _local_files(path, options):
        if not plain_name(file).endswith((".json", ".parquet")) or os.path.getsize(file) <= _MAX_BYTES_READ_TWICE:
            yield file, next(iter(records), None)


def _local_files(path: str, options: PairOptions) -> Iterator[tuple[str, Iterator[RawRecord]]]:
    """Yields each file of `path` that is here and no folder, and its records, of which none is read yet."""
    for file in files_of(path):
        if not (is_on_hub(file) or os.path.isdir(file)):
            yield file, _read_file(file, options)


def _read_file(path: str, options: PairOptions) -> Iterator[RawRecord]:
    max_bytes = options.max_record_bytes
    with open(path, "rb") as file:
        head = file.read(64)
    name = plain_name(path)
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: found a pointer of Git LFS, expected the file itself; run git lfs pull")
    if head.startswith(b"PAR1"):
        return _numbered(parquet_rows(path, options))
    if head.startswith(b"ARROW1") or name.endswith(".arrow"):
        return _numbered(arrow_rows(path, options))
    lines = _first_lines(path, max_bytes)
    first = next((line for line in lines if line.strip()), b"").lstrip()
    if any(map(_is_object, lines)):
        return _read_lines(path, max_bytes)
    if name.endswith((".csv", ".tsv")):
        return _read_csv(path, "\t" if name.endswith(".tsv") else ",", max_bytes)
    if name.endswith(".json") or first.startswith(b"[{") or first.rstrip() == b"[":
        return _read_json_array(path)
    if name.endswith((".jsonl", ".ndjson")):
        return _read_lines(path, max_bytes)
    if name.endswith(".parquet"):
        return _numbered(parquet_rows(path, options))
    raise DataError(
        f"{path}: found another kind of file, expected JSON lines, a list in JSON, CSV or TSV (as they are, .gz, .bz2 "
        "or .zst), parquet or arrow"
    )


def _first_lines(path: str, max_bytes: int) -> list[bytes]:
    if plain_name(path).endswith(".parquet"):
        with open(path, "rb") as plain:
            lines = [plain.readline(max_bytes)]
    else:
        try:
            with _open_lines(path) as file:
                lines = [file.readline(max_bytes) for _ in range(_LINES_LOOKED_AT)]
        except OSError as error:
            raise _damaged(path, 1, error) from None
    return [lines[0].removeprefix(b"\xef\xbb\xbf"), *lines[1:]]


def _is_object(line: bytes) -> bool:
    if not line.startswith(b"{"):
        return False
    try:
        return bool(parse_json(line))
    except BadRecord:
        return False


def _damaged(path: str, line: int, error: OSError) -> DataError:
    return DataError(f"{path}:{line}: found a damaged file ({error}), expected a whole one; copy it again")


def _open_lines(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        magic = file.read(4)
    said = next((name for ending, (name, _) in COMPRESSIONS.items() if path.endswith(ending)), None)
    found = next((name for name, first in COMPRESSIONS.values() if magic.startswith(first)), None)
    if said != found:
        raise DataError(f"{path}: found {found or 'uncompressed'} content, expected what the name says; rename it")
    if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}:1: invalid_utf8: found UTF-16, expected UTF-8; convert it")
    if found:
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression=found))
    return open(path, "rb")


def _read_lines(path: str, max_bytes: int) -> Iterator[RawRecord]:
    with _open_lines(path) as file:
        try:
            line = 0
            while raw := file.readline(max_bytes + 1):
                line += 1
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if len(raw) <= max_bytes:
                    yield RawRecord(line, raw, last=not raw.endswith(b"\n"))
                    continue
                yield RawRecord(line, None)
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(max_bytes)
        except OSError as error:
            raise _damaged(path, line + 1, error) from None


def _read_json_array(path: str) -> Iterator[RawRecord]:
    try:
        with _open_lines(path) as file:
            rows = parse_json_array(file.read())
    except BadRecord as error:
        raise DataError(f"{path}:1: {error.reason}: {error.detail}") from None
    for number, row in enumerate(rows, start=1):
        yield RawRecord(number, row)


def _read_csv(path: str, delimiter: str, max_bytes: int) -> Iterator[RawRecord]:
    with _open_lines(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        csv.field_size_limit(max_bytes)
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if len(header) < 2 or len(set(header)) < len(header):
                raise DataError(f"{path}:1: found another kind of file, expected a header with a name for each column")
            while True:
                line = rows.line_num + 1
                try:
                    cells = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield RawRecord(line, BadRecord("bad_csv", str(error)))
                    continue
                yield RawRecord(line, _csv_row(header, cells))
        except UnicodeDecodeError as error:
            found = f"0x{error.object[error.start]:02x} behind line {rows.line_num}"
            raise DataError(f"{path}: invalid_utf8: found {found}, expected UTF-8; convert it") from None
        except OSError as error:
            raise _damaged(path, rows.line_num + 1, error) from None


def _csv_row(header: list[str], cells: list[str]) -> dict | BadRecord:
    if not cells:
        return BadRecord("blank_line", "the line is blank")
    if len(cells) != len(header):
        return BadRecord("bad_csv", f"found {len(cells)} cells, expected {len(header)}, as in the header")
    return dict(zip(header, cells, strict=True))


def _read_saved_dataset(path: str) -> Iterator[RawRecord]:
    import datasets

    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.DatasetDict):
        names = sorted(map(str, loaded), key=lambda name: not name.startswith("train"))
        raise DataError(
            f"{path}: found the splits {listed(names, 8)}, expected one; name its folder, such as "
            f"{Path(path) / names[0]}"
        )
    yield from _numbered(loaded)


def _read_hub(path: str, options: PairOptions) -> Iterator[RawRecord]:
    """Yields the rows of `hub:NAME[:SPLIT]`, or of `hf://[datasets/]OWNER/NAME[@REVISION][/FILE][:SPLIT]`."""
    import datasets
    from huggingface_hub import hf_hub_download

    if path.startswith(HF_PREFIX):
        name, _, split = path.removeprefix(HF_PREFIX).removeprefix("datasets/").partition(":")
        parts = name.rstrip("/").split("/")
        name, file = "/".join(parts[:2]), "/".join(parts[2:])
    else:
        name, _, split = path.removeprefix(HUB_PREFIX).partition(":")
        file = ""
    name, _, revision = name.partition("@")
    try:
        if file and not glob.has_magic(file):
            # One file is read as any other here: records keep their lines, and odd ones are counted.
            downloaded = hf_hub_download(name, file, repo_type="dataset", revision=revision or None)
            yield from _read_file(downloaded, options)
            return
        split = split or "train"
        loaded = datasets.load_dataset(name, data_files=file or None, split=split, revision=revision or None)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: found nothing to read ({reason}), expected a data set of the hub") from None
    yield from _numbered(loaded)


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[RawRecord]:
    """Yields rows of a table, counted from 1, without the nulls that fill what other rows' objects have."""
    for number, row in enumerate(rows, start=1):
        yield RawRecord(number, {key: without_nulls(value) for key, value in row.items()})
