"""The outcome of a run, for programs: validation metrics, checkpoints, the exported model and why it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simpo_megatron.checkpoint.retention import last_and_best
from simpo_megatron.config import Config
from simpo_megatron.errors import ConfigError, StoppedByMonitor, StoppedBySignal
from simpo_megatron.reporting.loggers import METRICS_FILE
from simpo_megatron.reporting.metric_names import EVALUATION_PREFIX
from simpo_megatron.reporting.run_report import read_curves


@dataclass(frozen=True)
class RunResult:
    """The outcome of `train`, the same on every rank."""

    before: Mapping[str, float]
    """Validation metrics before step 1, by the names of metrics.jsonl such as `eval/rewards/accuracies`; empty without
    validation pairs."""
    after: Mapping[str, float]
    """Those of the last evaluation."""
    last_checkpoint: Path | None
    """Folder of the newest checkpoint; None without `save`."""
    best_checkpoint: Path | None
    """Folder of the checkpoint with the best validation accuracy; None where none was evaluated."""
    export_folder: Path | None
    """Folder of the exported model or adapters; None when the run did not end, or exported nothing."""
    exit_reason: str
    """`done`, `stopped by signal` or `stopped by monitor`."""


def result_of(
    config: Config, evaluations: Mapping[int, Mapping[str, float]], stopped: StoppedBySignal | StoppedByMonitor | None
) -> RunResult:
    """The outcome of a run whose `evaluations`, by iteration, were taken since it was started or resumed."""
    save = None if config.run.save is None else Path(config.run.save)
    if save is not None and 0 not in evaluations:
        evaluations = {**_evaluations_before(save), **evaluations}
    last, best = (None, None) if save is None else last_and_best(save)
    export = None if stopped is not None else config.model.export_hf or config.lora.export_adapter
    reasons = {StoppedBySignal: "stopped by signal", StoppedByMonitor: "stopped by monitor"}
    return RunResult(
        before=evaluations.get(0, {}),
        after=evaluations[max(evaluations)] if evaluations else {},
        last_checkpoint=last,
        best_checkpoint=best,
        export_folder=None if export is None else Path(export),
        exit_reason="done" if stopped is None else reasons[type(stopped)],
    )


def _evaluations_before(save: Path) -> dict[int, dict[str, float]]:
    """The evaluations of earlier starts of the run in `save`, by iteration."""
    try:
        curves = read_curves(save / METRICS_FILE)
    except (ConfigError, ValueError):
        return {}
    evaluations: dict[int, dict[str, float]] = {}
    for metric, points in curves.validation.items():
        for iteration, value in points:
            evaluations.setdefault(iteration, {})[EVALUATION_PREFIX + metric] = value
    return evaluations
