"""The lock on a run's folder: one run at a time, and the same folder on every machine."""

from __future__ import annotations

import os
import socket
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock

from simpo_megatron import atomic
from simpo_megatron.errors import CheckpointError
from simpo_megatron.limits import read_bounded

# Beside the lock file, which some versions of filelock empty when another process asks for it.
_HOLDER_FILE = ".holder"
_MAX_HOLDER = 400


@dataclass(frozen=True)
class RunLock:
    """The lock on a run's folder, held until it is released or the process ends."""

    nonce: str
    """The text that tells this holder from every other."""
    held: BaseFileLock

    def release(self) -> None:
        """Release the folder for the next run."""
        self.held.release()


def lock(save: Path) -> RunLock:
    """Creates the run's folder `save` and locks it.

    Raises:
        CheckpointError: another process holds it, or the folder cannot be written.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
        held = atomic.lock(save / atomic.LOCK_FILE)
    except BlockingIOError:
        raise CheckpointError(
            f"save: found {save} in use by another run ({_holder(save) or 'unknown'}), expected a folder of this run's "
            "own; wait for it or choose another folder"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"save: found {save}, which cannot be written ({error.strerror}), expected a folder that can be written"
        ) from None
    nonce = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
    try:
        atomic.write_text(save / _HOLDER_FILE, nonce)
    except BaseException as error:
        held.release()
        if isinstance(error, OSError):
            raise CheckpointError(
                f"save: found {save / _HOLDER_FILE}, which cannot be written ({error.strerror}), expected a file of "
                "this user; remove it"
            ) from None
        raise
    return RunLock(nonce, held)


def check_same_folder(save: Path, nonce: str) -> None:
    """Return if this rank sees the folder whose holder has `nonce`, and can write there.

    Raises:
        CheckpointError: it does not, or cannot.
    """
    if _holder(save) != nonce:
        raise CheckpointError(
            f"save: found {save} on {socket.gethostname()}, which is not the folder that rank 0 sees, expected one "
            "that all machines share"
        )
    try:
        # A file without a name: a rank that is killed here leaves nothing.
        tempfile.TemporaryFile(dir=save).close()
    except OSError as error:
        raise CheckpointError(
            f"save: found {save}, which {socket.gethostname()} cannot write ({error.strerror}) although rank 0 can, "
            "expected a folder that all can write"
        ) from None


def _holder(save: Path) -> str:
    try:
        return read_bounded(save / _HOLDER_FILE, _MAX_HOLDER).decode("utf-8", "replace")
    except OSError:
        return ""
