"""Files and folders that appear whole or not at all, and locks that end with their process.

A draft is written as `NAME.tmp-<32 hex digits>` beside its target. Once its bytes are on the disk, one rename gives it
its name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK_FILE = ".lock"
_DRAFT = re.compile(r"(.+)\.tmp-[0-9a-f]{32}")
# A draft is locked within this time; an older one without a lock was left by a process that has ended.
_LOCKED_WITHIN_SECONDS = 60.0
_MAX_ATTEMPTS = 10


def sync(path: Path) -> None:
    """Return once the content of `path`, a file or a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, *, wait_seconds: float = 0.0) -> BaseFileLock:
    """The lock file `path`, held until it is released or the process ends; a link is not followed.

    Raises:
        BlockingIOError: another process still holds it after `wait_seconds`.
        OSError: the file cannot be made.
    """
    held = FileLock(path, thread_local=False)
    try:
        held.acquire(timeout=wait_seconds)
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from None
    return held


def draft_name(path: Path) -> Path:
    """A new name beside `path` for its draft."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")


def draft_of(path: Path) -> str | None:
    """The target name of the draft at `path`; None when `path` is no draft."""
    found = _DRAFT.fullmatch(path.name)
    return found[1] if found else None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a draft path; at the end the draft replaces the file `path`, after an error it is deleted.

    A reader sees the old file or the new one, also after a crash.
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
    """Yields an empty draft folder; at the end it becomes `path`, after an error it is deleted.

    Drafts that killed processes left of the same folder are removed. A process that is killed in between leaves a draft
    and nothing under `path`.

    Args:
        first_wins: several processes may make the same folder at once, and the first to finish wins. Otherwise a
            second process is refused, and an existing `path` is replaced.

    Raises:
        BlockingIOError: another process is making the folder.
        OSError: it cannot be written.
    """
    draft, held = _locked_draft(path)
    try:
        if _remove_abandoned(path, apart_from=draft) and not first_wins:
            raise BlockingIOError(errno.EAGAIN, "another process is writing it", str(path))
        yield draft
        _publish(draft, path, replaces=not first_wins)
    finally:
        held.release()
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder, a draft of `path` that is deleted at the end; those that killed processes left go first.

    Raises:
        OSError: it cannot be made.
    """
    draft, held = _locked_draft(path)
    try:
        _remove_abandoned(path, apart_from=draft)
        yield draft
    finally:
        held.release()
        shutil.rmtree(draft, ignore_errors=True)


def rename(draft: Path, path: Path) -> None:
    """Rename the file or folder `draft`, which is on the disk, to the free name `path`; return once that is there too.

    Raises:
        OSError: the name is taken.
    """
    os.rename(draft, path)
    sync(path.parent)


def remove_folder(path: Path, *, inode: int | None = None) -> None:
    """Rename the folder `path` to a draft's name, then delete it; after a kill, only a draft is left.

    Args:
        inode: of the folder that is meant; another one, which a process has put there meanwhile, stays.

    Raises:
        FileNotFoundError: the folder that is meant is gone.
        OSError: it cannot be renamed.
    """
    doomed = draft_name(path)
    os.rename(path, doomed)
    if inode not in (None, doomed.stat().st_ino):
        with suppress(OSError):  # where there is a third one by now
            os.rename(doomed, path)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
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
    # Last: without its lock, the draft would soon be taken for one of a killed process.
    (draft / LOCK_FILE).unlink()
    sync(draft)
    if replaces:
        _replace(draft, path)
        return
    try:
        rename(draft, path)
    except OSError:
        if not path.exists():  # otherwise another process was first
            raise


def _replace(draft: Path, path: Path) -> None:
    replaced = draft_name(path)
    if path.exists():
        os.rename(path, replaced)
    rename(draft, path)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_abandoned(path: Path, *, apart_from: Path) -> list[Path]:
    """The drafts of `path` that living processes write; removes those that killed ones have left."""
    living = []
    for draft in path.parent.glob(f"{_literal(path.name)}.tmp-*"):
        if draft == apart_from or draft_of(draft) != path.name or draft.is_symlink() or not draft.is_dir():
            continue
        if not _was_abandoned(draft):
            living.append(draft)
    return living


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _locked_draft(path: Path) -> tuple[Path, BaseFileLock]:
    """Returns a new draft of `path` and its lock."""
    for attempt in range(_MAX_ATTEMPTS):
        draft = draft_name(path)
        draft.mkdir(parents=True)
        try:
            # Only a process that looks for abandoned drafts may hold it, for a moment.
            return draft, lock(draft / LOCK_FILE, wait_seconds=10.0)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            # Such a process may have been the first to lock it, and has removed it.
            if not isinstance(error, FileNotFoundError) or attempt == _MAX_ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def _was_abandoned(draft: Path) -> bool:
    """Removes a draft that no living process writes; False where one does."""
    try:
        # Opened, never made: who writes it may give the draft its name meanwhile, and a new lock would stay in it.
        descriptor = os.open(draft / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _was_left_without_lock(draft)
    except OSError:
        return False
    try:
        # The lock that `lock` takes, too.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It is held meanwhile, so that who made the draft a moment ago does not begin in it.
        shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        # Without flock filelock writes the number of its process into the file, and looks whether that one lives.
        return error.errno == errno.ENOSYS and _was_left_by_a_dead_process(draft)
    finally:
        os.close(descriptor)
    return True


def _was_left_by_a_dead_process(draft: Path) -> bool:
    try:
        held = lock(draft / LOCK_FILE)
    except OSError:
        return False
    shutil.rmtree(draft, ignore_errors=True)
    held.release()
    return True


def _was_left_without_lock(draft: Path) -> bool:
    try:
        if time.time() - draft.stat().st_mtime < _LOCKED_WITHIN_SECONDS:
            return False
    except OSError:
        return True  # it has become what it was to be
    shutil.rmtree(draft, ignore_errors=True)
    return True
