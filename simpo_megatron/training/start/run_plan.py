"""The plan of a run, from its configuration and its model's description; megatron is not needed for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from simpo_megatron.checkpoint.model_source import base_of, find_adapter
from simpo_megatron.config import Config, Layout, resolve
from simpo_megatron.config.lora_section import LoRAConfig
from simpo_megatron.convert import check_model_files
from simpo_megatron.errors import ConfigError, Refusals
from simpo_megatron.mcore import device
from simpo_megatron.mcore.families import ModelDescription, describe_hf_model
from simpo_megatron.reporting.loggers import check_sinks
from simpo_megatron.training.start.inputs import (
    Sources,
    check_exports,
    check_files,
    check_starting_again,
    locate_sources,
    require_positions,
)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The facts of a run that are known before any process group exists."""

    config: Config
    """The configuration, with the settings of the adapters that it names."""
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
    check_exports(config, sources.model, *sources.folders)
    for files in (sources.train, *sources.valid.values()):
        check_files(files)
    for folder in {sources.model, sources.tokenizer}:
        check_model_files(folder)
    description = describe_hf_model(sources.model)
    config = with_adapter_settings(config, sources, description)
    if any(config.lora.own_parts.values()):
        from simpo_megatron.convert import require_targets

        require_targets(description, config.lora)
    refusals = Refusals()
    with refusals.collected():
        require_positions(config, description.gpt["max_sequence_length"], sources.model)
    with refusals.collected():
        layout = resolve(config, world_size=world_size, model=description.transformer, machine=device.machine())
    refusals.raise_any()
    return RunPlan(config=config, sources=sources, description=description, layout=layout)


def with_adapter_settings(config: Config, sources: Sources, description: ModelDescription) -> Config:
    """`config`, in which rank, scale and targets are those of the adapters that go on training.

    Raises:
        ConfigError: it asks for others, or to export adapters that have no single base model.
    """
    asked = config.lora
    if asked.export_adapter is not None and sources.model_source.adapters:
        raise ConfigError(
            f"export_adapter: found {asked.export_adapter} with a model that is itself adapters on another, expected a "
            "model of its own; continue them with --adapter, or export the whole with --export-hf"
        )
    if sources.adapter is None:
        return config
    named = config.model.model or base_of(sources.adapter)
    settings = _settings_of(sources.adapter, asked, description)
    return replace(config, lora=settings, model=replace(config.model, model=named))


def with_adapter_of(config: Config, name: str, description: ModelDescription) -> Config:
    """`config` with the rank, scale and targets of the adapters that `name` means, for a model of `description`.

    Raises:
        ConfigError: it asks for others, or such adapters are not supported.
        CheckpointError: the adapters are not there, damaged, or of another model.
    """
    return replace(config, lora=_settings_of(find_adapter(name), config.lora, description))


def _settings_of(folder: Path, asked: LoRAConfig, description: ModelDescription) -> LoRAConfig:
    # Their tensors are looked at, which takes torch.
    from simpo_megatron.checkpoint.adapter_checkpoint import open_adapter

    found = open_adapter(folder, description).settings
    unset = LoRAConfig(lora_rank=found.lora_rank)
    for key in ("lora_rank", "lora_alpha", "use_rslora", "lora_targets"):
        value, expected = getattr(asked, key), getattr(found, key)
        is_unset = value is None or (key != "lora_rank" and value == getattr(unset, key))
        is_same = set(value) == set(expected) if key == "lora_targets" else value == expected
        if not is_unset and not is_same:
            raise ConfigError(
                f"{key}: found {value}, expected {expected}, that of the adapters in {folder}; leave it out"
            )
    return replace(found, lora_dropout=asked.lora_dropout, adapter=asked.adapter, export_adapter=asked.export_adapter)
