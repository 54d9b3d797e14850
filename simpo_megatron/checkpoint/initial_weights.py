"""The weights a run starts from: those of a Hugging Face folder, or of a committed checkpoint of any layout.

Adapters may come with them: some are added to the weights, and some go on training.
"""

from __future__ import annotations

from pathlib import Path

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.adapter_checkpoint import open_adapter
from simpo_megatron.checkpoint.foreign import read_foreign_weights
from simpo_megatron.checkpoint.model_source import ModelSource, find_foreign
from simpo_megatron.checkpoint.sharded_state import read_weights
from simpo_megatron.checkpoint.verification import read_verified
from simpo_megatron.convert import load_hf_weights
from simpo_megatron.convert.adapter_folder import AdapterTensors
from simpo_megatron.convert.files import require_finite
from simpo_megatron.convert.load_adapters import load_adapters, merge_adapter
from simpo_megatron.convert.weight_layouts import TensorRank
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.model import PreferenceGPTModel
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import raise_on_all_ranks


def fill_weights(
    model: list[PreferenceGPTModel], folder: Path, description: ModelDescription, groups: ParallelGroups
) -> None:
    """Fill this rank's `model` from `folder`, which holds safetensors or is a committed checkpoint.

    Collectives: that of `raise_on_all_ranks`, world; for a checkpoint, another one and megatron's.

    Raises:
        CheckpointError: on every rank alike, when the folder is damaged, or does not hold the model that its
            config.json describes.
        NumericsError: on every rank alike, when a weight is not finite.
    """
    if (folder / manifest.RECORD_FILE).is_file():
        read_verified(folder)
        read_weights(model, groups, folder)
    elif find_foreign(folder) is not None:
        read_foreign_weights(model, groups, folder, vocab_size=description.vocab_size)
    else:
        raise_on_all_ranks(
            lambda: load_hf_weights(model, folder, description, tp_rank=groups.tp.rank(), tp_size=groups.tp.size())
        )
        return
    raise_on_all_ranks(lambda: _require_finite(model, folder))


def fill_model(
    model: list[PreferenceGPTModel], source: ModelSource, description: ModelDescription, groups: ParallelGroups
) -> None:
    """Fill this rank's `model` from the base of `source`, and add its adapters to the weights, sums in fp32.

    Collectives: those of `fill_weights`, and for each adapter two `raise_on_all_ranks`, world.

    Raises:
        CheckpointError, NumericsError: as `fill_weights`.
        ConfigError: on every rank alike, adapters are of a kind that is not computed here.
    """
    fill_weights(model, source.base, description, groups)
    tp = TensorRank(groups.tp.rank(), groups.tp.size())
    for folder in source.adapters:
        adapter = _verified_adapter(folder, description)
        raise_on_all_ranks(lambda: merge_adapter(model, adapter, description, tp=tp))  # noqa: B023 - called at once


def fill_adapters(
    model: list[PreferenceGPTModel], folder: Path, description: ModelDescription, groups: ParallelGroups
) -> None:
    """Fill the adapters of this rank's `model`, which has those that are in `folder`, from there.

    Collectives: those of two `raise_on_all_ranks`, world; one more for a checkpoint.

    Raises:
        CheckpointError, NumericsError, ConfigError: as `fill_model`.
    """
    adapter = _verified_adapter(folder, description)
    tp = TensorRank(groups.tp.rank(), groups.tp.size())
    raise_on_all_ranks(lambda: load_adapters(model, adapter, description, tp=tp))


def _verified_adapter(folder: Path, description: ModelDescription) -> AdapterTensors:
    if (folder / manifest.RECORD_FILE).is_file():
        read_verified(folder)
    return raise_on_all_ranks(lambda: open_adapter(folder, description))


def _require_finite(model: list[PreferenceGPTModel], folder: Path) -> None:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            require_finite(parameter.detach(), f"{folder}: {name}")
