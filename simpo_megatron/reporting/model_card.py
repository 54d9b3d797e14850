"""The model card of an exported model: what it was made of and how, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simpo_megatron.config import Config, config_from, options_in_force, to_yaml
from simpo_megatron.mcore.precision import dtype_name, parameter_dtype
from simpo_megatron.reporting.run_report import Curves, before_and_after, headline_of, read_curves

_OF_TRAINING = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def model_card(config: Config, out_folder: str | Path, curves: Curves | None, dtype: torch.dtype) -> str:
    """The README.md of the model exported to `out_folder`, in the form that Hugging Face reads.

    Args:
        curves: of the run; None where it kept none.
        dtype: of the exported weights.
    """
    objective = config.objective
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [{objective.objective}, simpo_megatron]",
        "---",
        f"# {Path(out_folder).name}",
        "",
        f"Trained from `{Path(config.model.model or '').name}` with {objective.title} ({objective.paper}) "
        f"by simpo_megatron. Weights: {dtype_name(dtype)}, trained in {dtype_name(parameter_dtype(config.precision))}.",
    ]
    if curves is not None:
        lines += [headline_of(curves), *_metrics(curves)]
    return "\n".join([*lines, "", "## Configuration", "", "```yaml", to_yaml(config).rstrip(), "```", ""])


def card_of_checkpoint(
    options: Mapping[str, Any], metrics_file: Path | None, out_folder: str | Path, dtype: torch.dtype | None
) -> str:
    """The card of a checkpoint exported to `out_folder`, from what it keeps of its run.

    Args:
        options: of the run, as the checkpoint's manifest has them.
        metrics_file: the metrics.jsonl in the checkpoint; None where it keeps none.
        dtype: of the exported weights; None: that of the checkpoint.

    Raises:
        ConfigError: an option of the run is not one of this version, or the metrics cannot be read.
    """
    curves = None if metrics_file is None else read_curves(metrics_file)
    config = config_from(**options_in_force(options))
    return model_card(config, out_folder, curves, dtype or parameter_dtype(config.precision))


def _metrics(curves: Curves) -> list[str]:
    """Tables of the held-out pairs, before and after, and of the last training step; none of what was not taken."""
    lines = []
    held_out = before_and_after(curves.held_out)
    if held_out:
        lines += ["", "| held-out pairs | before | after | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in held_out]
    steps = [(metric, curves.training[metric][-1]) for metric in _OF_TRAINING if metric in curves.training]
    if steps:
        lines += ["", f"| training batch | step {steps[0][1][0]} |", "|---|---|"]
        lines += [f"| {metric} | {value:.4f} |" for metric, (_, value) in steps]
    return ["", "## Metrics", *lines] if lines else []
