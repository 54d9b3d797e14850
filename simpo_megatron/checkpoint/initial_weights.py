"""The weights a run starts from: those of a Hugging Face folder, or of a committed checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.sharded_state import read_weights
from simpo_megatron.checkpoint.verification import read_verified
from simpo_megatron.convert import load_hf_weights
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.model import PreferenceGPTModel
from simpo_megatron.parallel import ParallelGroups


def fill_weights(
    model: list[PreferenceGPTModel], folder: Path, description: ModelDescription, groups: ParallelGroups
) -> None:
    """Fill this rank's `model` from `folder`, which holds safetensors or is a committed checkpoint.

    Collectives: for a checkpoint, one object gather and megatron's, world.

    Raises:
        CheckpointError: the folder is damaged, or does not hold the model that its config.json describes.
    """
    if not (folder / manifest.RECORD_FILE).is_file():
        load_hf_weights(model, folder, description, tp_rank=groups.tp.rank(), tp_size=groups.tp.size())
        return
    read_verified(folder)
    read_weights(model, groups, folder)
