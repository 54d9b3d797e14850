"""The weights a run starts from: those of a Hugging Face folder, or of a committed checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.sharded_state import read_weights
from simpo_megatron.checkpoint.verification import read_verified
from simpo_megatron.convert import load_hf_weights
from simpo_megatron.convert.files import require_finite
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.model import PreferenceGPTModel
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import raise_on_all_ranks


def fill_weights(
    model: list[PreferenceGPTModel], folder: Path, description: ModelDescription, groups: ParallelGroups
) -> None:
    """Fill this rank's `model` from `folder`, which holds safetensors or is a committed checkpoint.

    Collectives: one object gather, world; for a checkpoint, another one and megatron's.

    Raises:
        CheckpointError: on every rank alike, when the folder is damaged, or does not hold the model that its
            config.json describes.
        NumericsError: on every rank alike, when a weight is not finite.
    """
    if not (folder / manifest.RECORD_FILE).is_file():
        raise_on_all_ranks(
            lambda: load_hf_weights(model, folder, description, tp_rank=groups.tp.rank(), tp_size=groups.tp.size())
        )
        return
    read_verified(folder)
    read_weights(model, groups, folder)
    raise_on_all_ranks(lambda: _require_finite(model, folder))


def _require_finite(model: list[PreferenceGPTModel], folder: Path) -> None:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            require_finite(parameter.detach(), f"{folder}: {name}")
