"""The log-probs of every validation pair before and after a run, by which `simpo report` compares runs."""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from simpo_megatron.atomic import new_file
from simpo_megatron.data import PreferenceDataset
from simpo_megatron.errors import ConfigError
from simpo_megatron.limits import check_plain

# numpy's reader and zipfile have errors of many kinds.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, OverflowError, RuntimeError, BadZipFile, zlib.error)
VALIDATION_PAIRS_FILE = "validation_pairs.npz"


@dataclass(frozen=True)
class ValidationPairs:
    """The log-probs of a run's first validation set, before step 1 and at the last evaluation."""

    fingerprint: str
    """A hash of all tokens of the pairs."""
    lengths: np.ndarray
    """int [P, 2]: tokens of chosen and rejected that the assistant wrote."""
    before: np.ndarray | None
    """float32 [P, 2]: average log-probs of chosen and rejected, nats per token; None where step 0 was not evaluated."""
    after: np.ndarray
    """The same, after `iteration` steps."""
    iteration: int


def keep_validation_pairs(run_folder: Path, iteration: int, averages: np.ndarray, dataset: PreferenceDataset) -> None:
    """Writes the log-probs of an evaluation into `run_folder`; those of step 0 and the latest are kept.

    Raises: ConfigError when the folder cannot be written.
    """
    path = run_folder / VALIDATION_PAIRS_FILE
    arrays: dict[str, Any] = {
        "fingerprint": np.array(dataset.fingerprint),
        "lengths": dataset.counted,
        "after": averages,
        "iteration": np.array(iteration),
    }
    before = averages if iteration == 0 else _before(path, dataset.fingerprint)
    if before is not None:
        arrays["before"] = before
    try:
        with new_file(path) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise ConfigError(f"save: found {path}, which cannot be written ({error.strerror})") from None


def read_validation_pairs(run_folder: Path) -> ValidationPairs | None:
    """The validation pairs of the run in `run_folder`; None where it has none.

    Raises: ConfigError when its file is damaged.
    """
    path = run_folder / VALIDATION_PAIRS_FILE
    if not path.exists():
        return None
    try:
        check_plain(path, sys.maxsize)
        with np.load(path, allow_pickle=False) as file:
            found = ValidationPairs(
                fingerprint=str(file["fingerprint"]),
                lengths=file["lengths"],
                before=file.get("before"),
                after=file["after"],
                iteration=int(file["iteration"]),
            )
        _check(found)
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: cannot be read ({error}), expected the validation pairs of a run") from None
    return found


def _check(found: ValidationPairs) -> None:
    """Raises: ValueError for arrays of other types and shapes."""
    for values, kind in ((found.lengths, "iu"), (found.before, "f"), (found.after, "f")):
        if values is not None and (values.dtype.kind not in kind or values.shape != (len(found.after), 2)):
            raise ValueError(f"found {values.dtype} {list(values.shape)} where numbers of pairs stand")


def _before(path: Path, fingerprint: str) -> np.ndarray | None:
    """The log-probs of step 0 from an earlier start of the run, for the same pairs."""
    try:
        known = read_validation_pairs(path.parent)
    except ConfigError:
        return None
    return known.before if known is not None and known.fingerprint == fingerprint else None
