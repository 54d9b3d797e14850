"""The checkpoints of a run that are kept: the newest ones, and the one with the best validation accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpo_megatron.atomic import remove_folder
from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.manifest import Checkpoint
from simpo_megatron.errors import CheckpointError

BEST_METRIC = "eval/rewards/accuracies"


def delete_old(save: Path, num_newest: int) -> list[Path]:
    """Removes all checkpoints but the newest `num_newest` and the one with the best validation accuracy; returns them.

    Anything that is not a valid checkpoint of this format stays, and with -1 every checkpoint does. A removed folder
    disappears in one rename.
    """
    if num_newest == -1:
        return []
    ours = _valid(save)
    kept = {checkpoint.iteration for checkpoint in (*ours[-num_newest:], *_best(ours))}
    removed = [checkpoint.folder for checkpoint in ours if checkpoint.iteration not in kept]
    for folder in removed:
        remove_folder(folder)
    return removed


def last_and_best(save: Path) -> tuple[Path | None, Path | None]:
    """The folders under `save` of the newest checkpoint and of the one with the best validation accuracy."""
    ours = _valid(save)
    last, best = ([checkpoint.folder for checkpoint in some] for some in (ours[-1:], _best(ours)))
    return (last[0] if last else None), (best[0] if best else None)


def _valid(save: Path) -> list[Checkpoint]:
    """The valid checkpoints under `save`, the oldest first."""
    return [checkpoint for folder in manifest.committed(save) if (checkpoint := _read_or_none(folder)) is not None]


def _best(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoint with the best validation accuracy, the later of equals; none where none was evaluated."""
    scored = [
        (accuracy, checkpoint.iteration, checkpoint)
        for checkpoint in checkpoints
        if (accuracy := _accuracy(checkpoint)) is not None
    ]
    return [max(scored, key=lambda entry: entry[:2])[2]] if scored else []


def _accuracy(checkpoint: Checkpoint) -> float | None:
    metrics = checkpoint.facts.get("metrics")
    value = metrics.get(BEST_METRIC) if isinstance(metrics, dict) else None
    return value if isinstance(value, float) else None


def _read_or_none(folder: Path) -> Checkpoint | None:
    try:
        return manifest.read(folder)
    except CheckpointError:
        return None
