"""The commit rule of checkpoint folders: whole and verified, or invisible. Files only; no tensors, no ranks.

A checkpoint is drafted in `iter_0000010.tmp-<uuid>` and its files are hashed. COMMIT.json, with their sizes and hashes,
is written last, and one rename gives the folder its name. A reader looks only at folders with such names, and trusts
only their COMMIT.json. A committed folder is never written to again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.atomic import draft_name, draft_of, move_aside, rename, sync, write_text
from simpo_megatron.errors import CheckpointError, listed
from simpo_megatron.limits import read_bounded

_LOGGER = logging.getLogger(__name__)

FORMAT = 1
RECORD_FILE = "COMMIT.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"
"""Megatron's pointer to the newest iteration, for its own readers; this package writes it and never follows it."""
RELEASE = "release"
"""Megatron's name for the folder, and the pointer, of weights that no run of its own has trained."""

_TABLES = ("model", "precision", "inputs", "training", "layout", "config", "versions", "metrics", "monitors")

_NAME = re.compile(r"iter_([0-9]{7,9})")
_MAX_POINTER_BYTES = 64
_MAX_RECORD_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20


class NewerFormatError(CheckpointError):
    """A checkpoint in the format of a newer version; it is not damaged."""


@dataclass(frozen=True)
class Digest:
    """Size and hash of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder, its files present with the sizes that were committed."""

    folder: Path
    iteration: int
    facts: Mapping[str, Any]
    """Facts that the writer stated of the run, as JSON values."""
    files: Mapping[str, Digest]

    @property
    def num_bytes(self) -> int:
        return sum(digest.size for digest in self.files.values())


def create_draft(save: Path, iteration: int) -> Path:
    """A new empty folder to write the checkpoint of `iteration` into; no reader sees it."""
    draft = draft_name(save / _name(iteration))
    draft.mkdir()
    return draft


def digest_file(path: Path) -> Digest:
    """Size and hash of a file, read from the disk."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            size += len(chunk)
    return Digest(size, sha256.hexdigest())


def hash_text(text: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def commit_draft(
    draft: Path, iteration: int, files: Mapping[str, Digest], facts: Mapping[str, Any], *, synced: Container[str] = ()
) -> Checkpoint:
    """Makes `draft` a checkpoint by one rename, after everything in it is on the disk; returns the checkpoint.

    Args:
        synced: names of files that their writers have put on the disk.

    Raises:
        CheckpointError: the draft's files are not those of `files`, or a checkpoint of this iteration exists.
    """
    folder = draft.parent / _name(iteration)
    if folder.exists():
        raise CheckpointError(f"{folder}: found a checkpoint, expected a free name; a checkpoint is never overwritten")
    checkpoint = Checkpoint(folder, iteration, facts, files)
    _seal(draft, checkpoint, synced)
    rename(draft, folder)
    write_latest(folder.parent, iteration)
    return checkpoint


def commit_weights_only(root: Path, facts: Mapping[str, Any], digests: Mapping[str, Digest]) -> Checkpoint:
    """Makes the files in `root`/release a checkpoint, and writes Megatron's pointer to it.

    A run neither continues from it nor removes it: it has weights, but no history. The caller renames `root` to its
    final name afterwards, so that all of it appears at once.

    Args:
        digests: of the files that were hashed when they were written; the others are hashed now.
    """
    folder = root / RELEASE
    files = {path.name: digests.get(path.name) or digest_file(path) for path in sorted(folder.iterdir())}
    checkpoint = Checkpoint(folder, 0, facts, files)
    _seal(folder, checkpoint)
    write_text(root / LATEST_FILE, f"{RELEASE}\n")
    return checkpoint


def resolve_checkpoint(path: Path) -> Path | None:
    """The committed folder at `path`: itself, or the newest in it; None when there is no checkpoint of ours."""
    if (path / RECORD_FILE).is_file():
        return path
    in_it = committed(path)
    if not in_it and (path / RELEASE / RECORD_FILE).is_file():
        return path / RELEASE
    return in_it[-1] if in_it else None


def _seal(folder: Path, checkpoint: Checkpoint, synced: Container[str] = ()) -> None:
    """Write the record of `checkpoint` into its `folder`, after everything else in it is on the disk."""
    _check_sizes(folder, checkpoint.files)
    for name in checkpoint.files:
        if name not in synced:
            sync(folder / name)
    (folder / RECORD_FILE).write_text(_to_text(checkpoint), encoding="utf-8")
    sync(folder / RECORD_FILE)
    sync(folder)


def write_latest(save: Path, iteration: int) -> None:
    """Write the pointer to the newest checkpoint that Megatron's own readers use; where that fails, only warn."""
    try:
        write_text(save / LATEST_FILE, f"{iteration}\n")
    except OSError as error:
        _LOGGER.warning("%s: could not be written (%s); no run here reads it", save / LATEST_FILE, error.strerror)


def stray_pointer(save: Path) -> str | None:
    """The text of Megatron's pointer, if it does not name the newest checkpoint; nothing else here reads it."""
    folders, path = committed(save), save / LATEST_FILE
    if not folders or not path.is_file():
        return None
    with path.open("rb") as file:
        said = file.read(_MAX_POINTER_BYTES).decode(errors="replace")
    return None if said == f"{iteration_of(folders[-1])}\n" else said


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, after a check: the record is complete, and files and sizes are those it lists.

    Raises:
        CheckpointError: naming the file that is not as it was committed.
    """
    checkpoint = _read_record(folder)
    _check_sizes(folder, checkpoint.files)
    return checkpoint


def check_hashes(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Return if the files `names` hold the bytes that were committed.

    Raises:
        CheckpointError: naming the first file that does not.
    """
    for name in names:
        expected = checkpoint.files[name].sha256
        found = digest_file(checkpoint.folder / name).sha256
        if found != expected:
            raise CheckpointError(
                f"{checkpoint.folder / name}: found SHA-256 {found[:16]}..., expected {expected[:16]}...: its bytes "
                "changed since it was committed"
            )


def committed(save: Path) -> list[Path]:
    """The folders under `save` that are named and marked as checkpoints, oldest first; links are not followed."""
    if not save.is_dir():
        return []
    folders = [entry for entry in save.iterdir() if _NAME.fullmatch(entry.name) and _is_real_folder(entry)]
    return sorted((folder for folder in folders if (folder / RECORD_FILE).is_file()), key=iteration_of)


def list_resumable(save: Path, resume: str) -> list[Path]:
    """The folders to try for `--resume`, best first: none, the one of an explicit step, or all.

    Raises:
        CheckpointError: the step is not there, or a checkpoint is required and there is none.
    """
    if resume == "none":
        return []
    folders = committed(save)
    if resume in ("latest", "required"):
        if resume == "required" and not folders:
            raise CheckpointError(f"resume: found no complete checkpoint in {save}, expected one with resume required")
        return folders[::-1]
    found = [folder for folder in folders if iteration_of(folder) == int(resume)]
    if not found:
        steps = ", ".join(str(iteration_of(folder)) for folder in folders) or "none"
        raise CheckpointError(
            f"resume: found no complete checkpoint of step {int(resume)} in {save}, expected one of: {steps}"
        )
    return found


def first_valid(
    folders: Sequence[Path], resume: str, check: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint | None, list[str]]:
    """(the first checkpoint that passes `check`, the errors of those before it); None when there are no folders.

    Raises:
        CheckpointError: an explicitly named step is damaged, or every checkpoint is; a newer version wrote one.
    """
    problems: list[str] = []
    for folder in folders:
        try:
            return check(folder), problems
        except NewerFormatError:
            raise
        except CheckpointError as error:
            if resume not in ("latest", "required"):
                raise
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"resume: found every checkpoint damaged ({listed(problems, 3, '; ')}), expected a whole one; "
            "--resume none starts anew"
        )
    return None, problems


def move_aside_newer(save: Path, iteration: int) -> list[Path]:
    """Renames the checkpoints later than `iteration`, so that no reader takes them for this run's; returns the paths.

    A run that continues from an earlier step, or starts anew, makes its own history.
    """
    moved = [move_aside(folder) for folder in reversed(committed(save)) if iteration_of(folder) > iteration]
    if moved:
        sync(save)
    return moved


def remove_drafts(save: Path) -> list[Path]:
    """Removes the drafts and half-removed folders that killed runs have left; returns them."""
    if not save.is_dir():
        return []
    drafts = [entry for entry in save.iterdir() if _is_draft(entry) and _is_real_folder(entry)]
    for entry in save.iterdir():
        if draft_of(entry) is not None and entry.is_file():
            entry.unlink(missing_ok=True)
    for draft in drafts:
        # A rank of the killed run may still be writing: the rest is removed the next time.
        shutil.rmtree(draft, ignore_errors=True)
    return drafts


def _is_draft(path: Path) -> bool:
    return _NAME.fullmatch(draft_of(path) or "") is not None


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """The number of steps after which the checkpoint in `folder` was saved, from its name."""
    named = _NAME.fullmatch(folder.name)
    return int(named[1]) if named else 0


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _to_text(checkpoint: Checkpoint) -> str:
    record = {
        "format": FORMAT,
        "iteration": checkpoint.iteration,
        "facts": dict(checkpoint.facts),
        "files": {name: [digest.size, digest.sha256] for name, digest in sorted(checkpoint.files.items())},
    }
    return json.dumps({**record, "sha256": _hash_of(record)}, indent=1, allow_nan=False) + "\n"


def _hash_of(record: Mapping[str, Any]) -> str:
    return hash_text(json.dumps(record, sort_keys=True))


def _read_record(folder: Path) -> Checkpoint:
    path = folder / RECORD_FILE
    try:
        record = json.loads(read_bounded(path, _MAX_RECORD_BYTES))
        form = record["format"]
        if isinstance(form, int) and form > FORMAT:
            raise NewerFormatError(
                f"{path}: found format {form} of a newer version, expected {FORMAT}; update simpo_megatron"
            )
        if form != FORMAT:
            raise ValueError(f"its format is {form!r}, this version reads {FORMAT}")
        if record.pop("sha256") != _hash_of(record):
            raise ValueError("its own hash does not match")
        files = {name: _digest(size, sha256) for name, (size, sha256) in record["files"].items()}
        checkpoint = Checkpoint(folder, record["iteration"], _checked_facts(record["facts"]), files)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}), expected a checkpoint's record") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: found no whole record of a checkpoint ({error}), expected it as it was written"
        ) from None
    if checkpoint.iteration != iteration_of(folder):
        raise CheckpointError(
            f"{path}: found the record of step {checkpoint.iteration}, expected that of {folder.name}"
        )
    return checkpoint


def _digest(size: Any, sha256: Any) -> Digest:
    if type(size) is not int or size < 0 or type(sha256) is not str:
        raise ValueError(f"it has {size!r} and {sha256!r} for a file's size and hash")
    return Digest(size, sha256)


def _checked_facts(facts: Any) -> Mapping[str, Any]:
    """`facts`, after checking the type of each that this version reads and that is there."""
    if not isinstance(facts, dict):
        raise ValueError("its facts are no table")
    for name in _TABLES:
        if not isinstance(facts.get(name, {}), dict):
            raise ValueError(f"its {name} is no table")
    pairs = facts.get("consumed_pairs", 0)
    if type(pairs) is not int or not 0 <= pairs < 1 << 62:
        raise ValueError(f"its consumed_pairs is {pairs!r}")
    return facts


def _check_sizes(folder: Path, files: Mapping[str, Digest]) -> None:
    # One listing, and one question for each of the files, which are as many as ranks.
    with os.scandir(folder) as entries:
        found = {entry.name: entry for entry in entries if entry.name != RECORD_FILE}
    for name, digest in files.items():
        entry = found.pop(name, None)
        if entry is None or not entry.is_file(follow_symlinks=False):
            raise CheckpointError(f"{folder / name}: found no plain file, expected the one that was committed")
        size = entry.stat(follow_symlinks=False).st_size
        if size != digest.size:
            raise CheckpointError(f"{folder / name}: found {size} bytes, expected {digest.size}, as were committed")
    if found:
        raise CheckpointError(
            f"{folder / min(found)}: found a file that is not part of the checkpoint, expected what was committed"
        )
