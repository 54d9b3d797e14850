"""Files and folders that appear whole or not at all, and locks that end with their process.

What is being written has the name `NAME.tmp-<32 hex digits>` beside its target; one rename gives it its name, after
its bytes are on the disk.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK_FILE = ".lock"
_DRAFT = re.compile(r"(.+)\.tmp-[0-9a-f]{32}")
# A draft gets its lock within this time; one without that is older was left by a process that is gone.
_LOCKED_WITHIN_SECONDS = 60.0


def sync(path: Path) -> None:
    """Return once what `path`, a file or a folder, holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, *, wait_seconds: float = 0.0) -> BaseFileLock:
    """The lock file `path`, held until it is released or the process ends; a link is not followed.

    Raises:
        BlockingIOError: another process holds it, and does so for `wait_seconds`.
        OSError: the file cannot be made.
    """
    held = FileLock(path, thread_local=False)
    try:
        held.acquire(timeout=wait_seconds)
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from None
    return held


def draft_name(path: Path) -> Path:
    """A new name beside `path` for what is to become it."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")


def draft_of(path: Path) -> str | None:
    """The name of what the draft at `path` was to become; None when `path` is no draft."""
    found = _DRAFT.fullmatch(path.name)
    return found[1] if found else None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write a file at, which becomes `path` at the end, in place of any other; after an error it is gone.

    A reader, also after a crash, sees the old file or the new one.
    """
    draft = draft_name(path)
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as the whole file `path`, in UTF-8."""
    with new_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` at the end; after an error it is gone.

    What killed processes have left of the same folder is removed. A process that is being stopped in the middle leaves
    such a draft and nothing under `path`.

    Args:
        first_wins: several processes make the same folder at once, and the first that is done stays. Otherwise a second
            process is refused, and what is at `path` is replaced.

    Raises:
        BlockingIOError: another process is making the folder.
        OSError: it cannot be written.
    """
    draft = draft_name(path)
    draft.mkdir(parents=True)
    try:
        # Only who looks for abandoned drafts may hold it, for a moment.
        held = lock(draft / LOCK_FILE, wait_seconds=10.0)
        try:
            if _remove_abandoned(path, apart_from=draft) and not first_wins:
                raise BlockingIOError(errno.EAGAIN, "another process is writing it", str(path))
            yield draft
            _publish(draft, path, replaces=not first_wins)
        finally:
            held.release()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def rename(draft: Path, path: Path) -> None:
    """Give the folder `draft`, whose files are on the disk, the free name `path`, and return once that is on the disk.

    Raises:
        OSError: the name is taken.
    """
    os.rename(draft, path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Make the folder `path` disappear in one rename, then remove it; after a kill, what is left of it is a draft."""
    doomed = draft_name(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def move_aside(path: Path) -> Path:
    """The new path of the file or folder `path`, renamed so that no reader takes it for what it was."""
    aside = path.with_name(f"{path.name}.aside-{uuid.uuid4().hex[:8]}")
    os.rename(path, aside)
    return aside


def _publish(draft: Path, path: Path, *, replaces: bool) -> None:
    for entry in draft.rglob("*"):
        if not entry.is_symlink():
            sync(entry)
    # Last, for without its lock the draft is taken for a killed process's before long.
    (draft / LOCK_FILE).unlink()
    sync(draft)
    if path.exists() and not replaces:
        return
    replaced = draft_name(path)
    if path.exists():
        os.rename(path, replaced)
    try:
        rename(draft, path)
    except OSError:
        if replaces or not path.exists():
            raise
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_abandoned(path: Path, *, apart_from: Path) -> list[Path]:
    """The drafts of `path` that a living process writes; those that killed ones have left are removed."""
    living = []
    for draft in path.parent.glob(f"{_literal(path.name)}.tmp-*"):
        if draft == apart_from or draft_of(draft) != path.name or draft.is_symlink() or not draft.is_dir():
            continue
        if _is_written(draft):
            living.append(draft)
        else:
            shutil.rmtree(draft, ignore_errors=True)
    return living


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _is_written(draft: Path) -> bool:
    if not (draft / LOCK_FILE).exists():
        try:
            return time.time() - draft.stat().st_mtime < _LOCKED_WITHIN_SECONDS
        except OSError:
            return False
    try:
        lock(draft / LOCK_FILE).release()
    except OSError:
        return True
    return False
