"""The plan of a run, from its configuration and its model's description; megatron is not needed for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpo_megatron.config import Config, Layout, resolve
from simpo_megatron.convert import check_model_files, refuse_existing_export
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import device
from simpo_megatron.mcore.families import ModelDescription, describe_hf_model
from simpo_megatron.reporting.loggers import check_sinks
from simpo_megatron.training.inputs import Sources, check_files, check_starting_again, locate_sources


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The facts of a run that are known before any process group exists."""

    sources: Sources
    description: ModelDescription
    layout: Layout


def plan_run(config: Config, world_size: int) -> RunPlan:
    """The plan of `config` on `world_size` ranks; every rank computes it alone and finds the same mistakes.

    Raises:
        ConfigError: ranks, model, machine and options do not fit together, or a package that logs is not installed.
        CheckpointError: the model's folder is not one, or the export would overwrite something.
        DataError: a preference file is not there or cannot be read.
    """
    check_sinks(config)
    check_starting_again(config)
    sources = locate_sources(config)
    _check_exports(config, sources)
    for files in (sources.train, *sources.valid.values()):
        check_files(files)
    check_model_files(sources.model)
    description = describe_hf_model(sources.model)
    most_positions = description.gpt["max_sequence_length"]
    if config.pairs.max_length > most_positions:
        raise ConfigError(
            f"max_length: found {config.pairs.max_length}, expected at most {most_positions}, the positions of the "
            f"model in {sources.model}; lower it, and max_prompt_length ({config.pairs.max_prompt_length}) below it"
        )
    layout = resolve(config, world_size=world_size, model=description.transformer, machine=device.machine())
    return RunPlan(sources=sources, description=description, layout=layout)


def _check_exports(config: Config, sources: Sources) -> None:
    """Refuse exports that would replace the model, the run's own folder or each other."""
    exports = {"export_hf": config.model.export_hf, "export_adapter": config.lora.export_adapter}
    taken = [] if config.run.save is None else [Path(config.run.save).resolve()]
    for key, folder in exports.items():
        if folder is None:
            continue
        refuse_existing_export(folder, sources.model)
        path = Path(folder).resolve()
        if any(path in (other, *other.parents) for other in taken):
            raise ConfigError(
                f"{key}: found {folder}, where the run or another export is, expected a folder of its own; name one"
            )
        taken.append(path)
