"""The model card of an exported model: its sources, settings and results, with the hub's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from simpo_megatron.config import Config, config_from, options_in_force, to_yaml
from simpo_megatron.mcore.hf import file_of_model, hub_name
from simpo_megatron.mcore.precision import dtype_name, parameter_dtype
from simpo_megatron.reporting.hub_facts import facts_of_card
from simpo_megatron.reporting.rendering import render
from simpo_megatron.reporting.run_report import Curves, Point, before_and_after, headline_of, read_curves

_OF_TRAINING = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
# Metric of an evaluation; its type and name in the card's front matter.
_RESULTS = (
    ("rewards/accuracies", "accuracy", "Reward accuracy"),
    ("rewards/margins", "rewards/margins", "Reward margin"),
    ("loss", "loss", "Loss"),
)


def model_card(
    config: Config,
    out_folder: str | Path,
    curves: Curves | None,
    dtype: torch.dtype,
    *,
    is_adapter: bool = False,
) -> str:
    """The README.md of the model, or of the adapters, exported to `out_folder`.

    Args:
        curves: of the run; None where it kept none.
        dtype: of the exported weights.
    """
    objective, name = config.objective, Path(out_folder).name
    base_model = hub_name(config.model.model or "")
    results = [] if curves is None else _eval_results(curves)
    of_base: dict[str, Any] = facts_of_card(file_of_model(config.model.model or "", "README.md"))
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_model else None,
        datasets=_hub_datasets(config) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[objective.objective, *(["lora"] if config.lora.lora_rank is not None else []), "simpo_megatron"],
        **of_base,
        # huggingface_hub needs a name for results, and drops a name without results.
        model_name=name if results else None,
        eval_results=results or None,
    )
    training = [] if curves is None else _last_step(curves)
    return _card(
        "model_card.md",
        data,
        name=name,
        started_from=base_model or Path(config.model.model or "").name,
        is_adapter=is_adapter,
        chat_template=_template(config),
        objective=f"{objective.title} ({objective.paper})",
        dtype=dtype_name(dtype),
        trained_in=dtype_name(parameter_dtype(config.precision)),
        headline="" if curves is None else headline_of(curves),
        validation=[] if curves is None else before_and_after(curves.validation),
        last_step=training[0][1][0] if training else None,
        training=[(metric, f"{value:.4f}") for metric, (_, value) in training],
        chat_template_args=config.pairs.chat_template_args,
        config=to_yaml(config).rstrip(),
    )


def card_of_checkpoint(
    options: Mapping[str, Any], metrics_file: Path | None, out_folder: str | Path, dtype: torch.dtype | None
) -> str:
    """The card of a checkpoint exported to `out_folder`, from the checkpoint's facts of its run.

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


def merged_model_card(name: str, parts: Sequence[tuple[float, str]]) -> str:
    """The README.md of the model `name` that is the average of `parts`, each a share and the name of a model."""
    named = [hub_name(model) for _, model in parts]
    on_hub = [model for model in named if model is not None]
    data = ModelCardData(
        base_model=on_hub if len(on_hub) == len(parts) else None,
        base_model_relation="merge" if len(on_hub) == len(parts) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "simpo_megatron"],
    )
    return _card("merged_model_card.md", data, name=name, parts=[(f"{share:g}", model) for share, model in parts])


def _card(template: str, data: ModelCardData, **values: object) -> str:
    return str(ModelCard(render(template, front_matter=data.to_yaml(), **values)))


def _hub_datasets(config: Config) -> list[str]:
    names = [str(item).split(":")[1] for item in config.data.data if str(item).startswith("hub:")]
    return list(dict.fromkeys(names))


def _template(config: Config) -> str:
    """The chat template's name or file name; empty for the tokenizer's own."""
    return Path(config.pairs.chat_template).name


def _eval_results(curves: Curves) -> list[EvalResult]:
    """The last evaluation of each validation set, or of the only one."""
    sets = curves.named or {"": curves.validation}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="preference-pairs",
            dataset_name=f"validation {name}".strip(),
            # The hub joins results of one type and config.
            dataset_config=name or None,
            metric_type=metric_type,
            metric_name=title,
            metric_value=round(metrics[metric][-1][1], 4),
        )
        for name, metrics in sets.items()
        for metric, metric_type, title in _RESULTS
        if metric in metrics and math.isfinite(metrics[metric][-1][1])
    ]


def _last_step(curves: Curves) -> list[tuple[str, Point]]:
    return [(metric, curves.training[metric][-1]) for metric in _OF_TRAINING if metric in curves.training]
