"""Files behind a path of preference data: the shards of a folder or a pattern, and their kinds."""

from __future__ import annotations

import glob
import os
import re
import stat
from pathlib import Path

from simpo_megatron.errors import DataError, listed

HUB_PREFIX = "hub:"
HF_PREFIX = "hf://"

_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = {".gz": ("gzip", b"\x1f\x8b"), ".bz2": ("bz2", b"BZh"), ".zst": ("zstd", b"\x28\xb5\x2f\xfd")}
"""The name and the first bytes of each compression that is read, by the ending of its files."""
_NOT_DATA = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|config\.json|README.*|LICENSE.*|[._].*")
# The end of a shard's name: train-00000-of-00008, part-3, chunk_007, 12.
_SHARD_NUMBER = re.compile(r"([-_.]?\d+(-of-\d+)?(-[0-9a-f]{16,})?)+$")
_SPLIT_NAME = re.compile(r"(train|test|valid|validation|val|dev|eval)([-_.]|$)")


def is_on_hub(path: str) -> bool:
    """Returns whether a path names a data set of the hub."""
    return path.startswith((HUB_PREFIX, HF_PREFIX))


def files_of(path: str) -> list[str]:
    """Returns the files of `path`: itself, those of a folder, or those that match a pattern, sorted by name.

    Raises: DataError: there is none, one cannot be read, or they are of several splits or kinds.
    """
    if is_on_hub(path):
        return [path]
    path = os.path.expanduser(path)
    if not os.path.lexists(path) and glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise DataError(f"{path}: found no file that matches, expected preference files")
        return [file for match in found for file in files_of(match)]
    check_one(path)
    if not os.path.isdir(path) or is_saved_dataset(path):
        return [path]
    return _files_of_folder(path)


def is_saved_dataset(path: str) -> bool:
    """Returns whether a folder was written by datasets.save_to_disk."""
    return any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json"))


def check_readable(path: str) -> None:
    """Raises DataError, in one line, for a path that stands for no readable preference file."""
    for file in files_of(path):
        if not is_on_hub(file):
            check_one(file)


def check_one(path: str) -> None:
    """Raises DataError, in one line, for a path that is neither a readable file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise DataError(f"{path}: found no such file, expected a preference file") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({(error.strerror or str(error)).lower()}), expected a preference file"
        ) from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{path}: found a special file, expected a regular file")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read (permission denied), expected a preference file")


def plain_name(path: str) -> str:
    """Returns a file's name in lower case, without the ending of its compression."""
    name = os.path.basename(path).lower()
    return name.removesuffix(next((end for end in COMPRESSIONS if name.endswith(end)), ""))


def _files_of_folder(path: str) -> list[str]:
    files = [
        file
        for file in sorted(Path(path).rglob("*"))
        if file.is_file()
        and plain_name(str(file)).endswith(_ENDINGS)
        and not any(_NOT_DATA.fullmatch(part) for part in file.relative_to(path).parts)
    ]
    kinds = sorted({os.path.splitext(plain_name(str(file)))[1] for file in files})
    if not files:
        raise DataError(
            f"{path}: found a folder without data, expected preference files or what datasets.save_to_disk writes"
        )
    if len(kinds) > 1:
        raise DataError(f"{path}: found a folder of {', '.join(kinds)} files, expected one kind; name the files")
    splits = sorted({_split_of(file) for file in files})
    if len(splits) > 1 and any(_SPLIT_NAME.match(Path(split).name) for split in splits):
        raise DataError(
            f"{path}: found a folder of the splits {listed(splits, 8)}, expected one; name its files, such as "
            f"'{path.rstrip('/')}/**/{Path(splits[-1]).name}*{kinds[0]}'"
        )
    return [str(file) for file in files]


def _split_of(file: Path) -> str:
    """Returns the name of a shard without its number; a folder that is named for a split says it too."""
    name = plain_name(str(file))
    stem = _SHARD_NUMBER.sub("", name.removesuffix(os.path.splitext(name)[1]))
    return file.parent.name if not stem or _SPLIT_NAME.match(file.parent.name) else stem
