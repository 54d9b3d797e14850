"""Preference files: which file, with which weight, and its raw records one by one."""

import io
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import BadRecord, parse_json_array
from simpo_megatron.errors import ConfigError, DataError

HUB_PREFIX = "hub:"

METRIC_GROUPS = frozenset({"rewards", "logps", "response_length"})
"""First parts of the names of metrics, as in `eval/rewards/chosen`; no validation set can have such a name."""

_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True)
class Source:
    """A file, a folder or a `hub:NAME[:SPLIT]`, and its share of an epoch (None: all of it)."""

    path: str
    weight: float | None = None


@dataclass(frozen=True)
class RawRecord:
    """One record before parsing: a JSON line, a parsed row, or None if too long; `line` counts from 1."""

    line: int
    row: bytes | dict | None
    last: bool = False


def parse_sources(data: Sequence[str | float | Mapping[str, Any]]) -> tuple[Source, ...]:
    """Returns the files of `data`: paths, weights and paths in turn (Megatron's blend), or mappings.

    Raises: ConfigError when weights are given to some files and not to others, or are not positive.
    """
    sources, weight = [], None
    for item in data:
        if isinstance(item, Mapping):
            if set(item) - {"path", "weight"} or "path" not in item:
                raise ConfigError(f"data: found {item!r}, expected the keys path and weight")
            sources.append(Source(str(item["path"]), item.get("weight")))
        elif (number := _number(item)) is not None and weight is None:
            weight = number
        else:
            sources.append(Source(str(item), weight))
            weight = None
    if weight is not None:
        raise ConfigError(f"data: found the weight {weight:g} at the end, expected a file after it")
    if not sources:
        raise ConfigError("data: found no file, expected at least one")
    weights = [source.weight for source in sources]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise ConfigError("data: found files with a weight and files without, expected all or none")
    if any(w is not None and not w > 0 for w in weights):
        raise ConfigError(f"data: found the weights {weights}, expected numbers above 0")
    return tuple(sources)


def parse_named_sources(data: Sequence[str]) -> dict[str, list[str]]:
    """Returns the paths of each named set, in the order in which the names first appear.

    `NAME=PATH` belongs to the set NAME, a path beside such ones to a set named after its file. Where nothing has
    a name, all of `data` is one set, called "". A name holds no slash: `./a=b.jsonl` is a path.

    Raises: ConfigError when two sets have one name and no `NAME=` tells them apart, or a name is one of METRIC_GROUPS:
    metrics of a set are called `eval/NAME/...`, metrics of the first or only one `eval/...`.
    """
    matches = [_NAMED.fullmatch(item) for item in data]
    if not any(matches):
        return {"": list(data)} if data else {}
    named: dict[str, list[str]] = {}
    explicit = set()
    for item, match in zip(data, matches, strict=True):
        name, path = match.groups() if match else (Path(item).name.split(".")[0], item)
        if name in named and not (match and name in explicit):
            raise ConfigError(f"valid_data: found two sets called {name!r}, expected different names; write NAME=PATH")
        if name in METRIC_GROUPS:
            raise ConfigError(
                f"valid_data: found a set called {name}, the name of a group of metrics (eval/{name}/...), expected "
                "another name; write NAME=PATH"
            )
        if match:
            explicit.add(name)
        named.setdefault(name, []).append(path)
    return named


def source_identity(path: str) -> dict:
    """Returns what tells that a source has changed: its path, and its files' sizes and times of change.

    Raises: DataError when the path cannot be read as a preference file.
    """
    if path.startswith(HUB_PREFIX):
        return {"path": path}
    check_readable(path)
    root = Path(path)
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    stats = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return {"path": str(root.resolve()), "files": stats}


def check_readable(path: str) -> None:
    """Raises DataError, in one line, for a path that is not a readable preference file or folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise DataError(f"{path}: found no such file, expected a preference file") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({(error.strerror or str(error)).lower()}), expected a preference file"
        ) from None
    if stat.S_ISDIR(mode):
        if not (Path(path) / "dataset_info.json").exists() and not (Path(path) / "dataset_dict.json").exists():
            raise DataError(f"{path}: found a folder, expected a file or a folder written by datasets.save_to_disk")
        return
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: found a special file, expected a regular file")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read (permission denied), expected a preference file")


def read_raw(path: str, options: PairOptions) -> Iterator[RawRecord]:
    """Yields the raw records of `path`, in file order, holding a few of them (of a .json file, all).

    Raises: DataError for a file that is not what its name says.
    """
    if path.startswith(HUB_PREFIX):
        yield from _read_hub(path)
        return
    check_readable(path)
    if os.path.isdir(path):
        yield from _read_datasets_folder(path)
    elif path.endswith(".parquet"):
        yield from _read_parquet(path)
    elif path.endswith(".json"):
        yield from _read_json_array(path)
    elif path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        yield from _read_lines(path, options.max_record_bytes)
    else:
        raise DataError(
            f"{path}: found another kind of file, expected .jsonl, .jsonl.gz, .jsonl.zst, .json or .parquet"
        )


def _open_lines(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        magic = file.read(4)
    is_gzip, is_zstd = magic[:2] == b"\x1f\x8b", magic == b"\x28\xb5\x2f\xfd"
    if is_gzip != path.endswith(".gz") or is_zstd != path.endswith(".zst"):
        kind = "gzip" if is_gzip else "zstd" if is_zstd else "uncompressed"
        raise DataError(f"{path}: found {kind} content, expected what the name says; rename it")
    if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}:1: invalid_utf8: found UTF-16, expected UTF-8; convert it")
    if is_gzip or is_zstd:
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="gzip" if is_gzip else "zstd"))
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
            raise DataError(
                f"{path}:{line + 1}: found a damaged file ({error}), expected a whole one; copy it again"
            ) from None


def _read_json_array(path: str) -> Iterator[RawRecord]:
    try:
        rows = parse_json_array(Path(path).read_bytes())
    except BadRecord as error:
        raise DataError(f"{path}:1: {error.reason}: {error.detail}") from None
    for number, row in enumerate(rows, start=1):
        yield RawRecord(number, row)


def _read_parquet(path: str) -> Iterator[RawRecord]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield RawRecord(number, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: found {str(error).splitlines()[0]!r}, expected a readable parquet file") from None


def _read_datasets_folder(path: str) -> Iterator[RawRecord]:
    import datasets

    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(
            f"{path}: found the splits {', '.join(loaded)}, expected one; name its folder, such as {path}/train"
        )
    for number, row in enumerate(loaded, start=1):
        yield RawRecord(number, row)


def _read_hub(path: str) -> Iterator[RawRecord]:
    import datasets

    name, _, split = path.removeprefix(HUB_PREFIX).partition(":")
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found {str(error).splitlines()[0]!r}, expected a data set of the hub") from None
    for number, row in enumerate(loaded, start=1):
        yield RawRecord(number, row)


def _number(item: object) -> float | None:
    if isinstance(item, (int, float)):
        return float(item)
    try:
        return float(str(item))
    except ValueError:
        return None
