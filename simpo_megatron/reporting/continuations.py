"""Greedy continuations of a few validation prompts before and after a run, for its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from simpo_megatron.atomic import write_text
from simpo_megatron.errors import ConfigError
from simpo_megatron.limits import read_bounded

SAMPLES_FILE = "samples.json"
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Samples:
    """The continuations of the same prompts before and after a run."""

    prompts: list[str]
    before: list[str] | None
    """Before step 1; None where step 0 was not evaluated."""
    after: list[str]
    iteration: int
    """Steps before the samples `after`."""


def keep_samples(run_folder: Path, iteration: int, prompts: Sequence[str], samples: Sequence[str]) -> None:
    """Writes the samples of an evaluation into `run_folder`; those of step 0 and the latest are kept.

    Raises: ConfigError when the folder cannot be written.
    """
    known, path = read_samples(run_folder), run_folder / SAMPLES_FILE
    before = known.before if known is not None and known.prompts == list(prompts) else None
    found = Samples(list(prompts), list(samples) if iteration == 0 else before, list(samples), iteration)
    try:
        write_text(path, json.dumps(asdict(found), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"save: found {path}, which cannot be written ({error.strerror})") from None


def read_samples(run_folder: Path) -> Samples | None:
    """The samples of the run in `run_folder`; None where there are none that can be read."""
    try:
        found = Samples(**json.loads(read_bounded(run_folder / SAMPLES_FILE, _MAX_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    columns = [found.prompts, found.after, *([] if found.before is None else [found.before])]
    is_sound = all(isinstance(column, list) and len(column) == len(found.prompts) for column in columns)
    is_sound = is_sound and all(isinstance(text, str) for column in columns for text in column)
    return found if is_sound and type(found.iteration) is int else None
