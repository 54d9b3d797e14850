"""PEFT's folder of adapters: its files, and the model that it names; read without torch."""

from __future__ import annotations

import os
from pathlib import Path

from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore.hf import read_hf_json

PREFIX = "base_model.model."
"""The beginning of every tensor's name."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_WEIGHTS_OF_A_MODEL = ("model.safetensors", "model.safetensors.index.json")


def is_peft_folder(folder: Path) -> bool:
    """True where `folder` holds adapters, and no model of its own."""
    has_weights = any((folder / name).is_file() for name in _WEIGHTS_OF_A_MODEL)
    return (folder / CONFIG_FILE).is_file() and not has_weights


def base_model_of(folder: Path) -> str:
    """The name of the model that the adapters of a PEFT folder belong to: OWNER/NAME, OWNER/NAME@REVISION or a path.

    Raises:
        CheckpointError: the folder names none.
    """
    config = read_hf_json(folder, CONFIG_FILE)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path: found {str(name)[:60]!r}, expected the model that the "
            "adapters belong to; write it there, or train with --model BASE --adapter DIR"
        )
    is_path = os.path.isdir(name)
    return f"{name}@{revision}" if isinstance(revision, str) and revision and not is_path else name
