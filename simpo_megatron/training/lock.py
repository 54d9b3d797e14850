"""The lock on a run's folder: one run at a time, and the same folder on every machine."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import uuid
from pathlib import Path
from typing import IO

from simpo_megatron.errors import CheckpointError

_LOCK_FILE = ".lock"
_MAX_HOLDER = 400


def lock(save: Path) -> IO[str]:
    """The open lock file of the run's folder, which is made; the lock lasts until the file or the process ends.

    Raises:
        CheckpointError: another process holds it, or the folder cannot be written.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
        # A lock of the process, not of the open file: a process that it forked and that outlives it does not keep it.
        file = (save / _LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"save: found {save}, expected a folder that can be written ({error.strerror}); name another"
        ) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        other = holder(file) or "unknown"
        file.close()
        raise CheckpointError(
            f"save: found {save} in use by another run ({other}), expected a free folder; wait for it or choose another"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}")
    file.flush()
    os.fsync(file.fileno())
    return file


def holder(held: IO[str]) -> str:
    """What the open lock file says of its holder, which no other run's does."""
    held.seek(0)
    return held.read(_MAX_HOLDER)


def check_same_folder(save: Path, expected_holder: str) -> None:
    """Nothing, when this rank sees the folder that `expected_holder` locked, and can write there. Not for the
    holder's own process.

    Raises:
        CheckpointError: it does not, or cannot.
    """
    try:
        found = (save / _LOCK_FILE).read_text(encoding="utf-8")
    except OSError:
        found = ""
    if found != expected_holder:
        raise CheckpointError(
            f"save: found another {save} on {socket.gethostname()} than on rank 0, expected one folder; name one that "
            "all machines share"
        )
    try:
        # Nameless: a rank that is killed here leaves nothing.
        tempfile.TemporaryFile(dir=save).close()
    except OSError as error:
        raise CheckpointError(
            f"save: found {save}, expected a folder that {socket.gethostname()} can write, as rank 0 can "
            f"({error.strerror})"
        ) from None
