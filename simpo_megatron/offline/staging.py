"""Output folders that appear only when they are whole, and what a killed process leaves of them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simpo_megatron.convert.folder import publish
from simpo_megatron.errors import CheckpointError


@contextmanager
def new_folder(out_folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out_folder` in one rename at the end; after an error it is gone.

    What a killed process has left of the same output is removed.

    Raises:
        CheckpointError: another process is writing the same output, or the place cannot be written.
    """
    staging = out_folder.parent / f".{out_folder.name}.partial"
    try:
        out_folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        held = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{out_folder}: cannot be written ({error.strerror})") from None
    try:
        _lock(held, staging, out_folder)
        _empty(staging)
        try:
            yield staging
            publish(staging, out_folder)
        except OSError as error:
            raise CheckpointError(f"{out_folder}: could not be written ({error.strerror})") from error
        finally:
            # Published, it has another name.
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(held)


def _lock(held: int, staging: Path, out_folder: Path) -> None:
    """Keep `staging` for this process; the lock ends with it, however it ends."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        still_there = os.fstat(held).st_ino == staging.stat().st_ino
    except OSError:
        still_there = False
    if not still_there:
        raise CheckpointError(
            f"{out_folder}: found another process writing it, expected none; wait for it or name another folder"
        )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
