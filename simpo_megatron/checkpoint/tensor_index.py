"""The index of a checkpoint's tensors: read as data alone, and compared with what a model expects."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from simpo_megatron.errors import CheckpointError, listed

_INDEX_FILE = ".metadata"
# How the names begin of what is stored beside a model's weights.
_NO_WEIGHTS = ("optimizer.", "rng.", "common_state")
# The index of tensors is made of these: modules of data classes, and single names.
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_INDEX_NAMES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
}


def check_index(folder: Path) -> set[str]:
    """Names in the index of tensors in `folder`, when it and the files it names in `folder` are data alone.

    torch unpickles the index, and what the index calls an object (the newest megatron-core keeps its settings so),
    whatever they may call.

    Raises:
        CheckpointError: it names something that is no part of such an index, or a file elsewhere, or an object
            that is more than numbers, texts and tensors.
    """
    path = folder / _INDEX_FILE
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        files = {entry.name for entry in folder.iterdir()}
        for key, stored in index.storage_data.items():
            if stored.relative_path not in files:
                raise pickle.UnpicklingError(f"it refers to the file {stored.relative_path}")
            if not isinstance(index.state_dict_metadata[key.fqn], TensorStorageMetadata):
                with (folder / stored.relative_path).open("rb") as file:
                    file.seek(stored.offset)
                    torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
        return set(index.state_dict_metadata)
    except Exception as error:
        raise CheckpointError(f"{path}: not an index of tensors ({error})") from None


class _IndexUnpickler(pickle.Unpickler):
    """Builds the data classes of torch's checkpoint index and refuses everything else by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in _INDEX_MODULES and "." not in name:
            found = super().find_class(module, name)
            # Not what the module itself has imported.
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def refuse_other_weights(stored: set[str], expected: set[str], folder: Path) -> None:
    """Return if all that is stored belongs to the model, or to a run's optimizer and random states.

    Raises:
        CheckpointError: naming what the model has not, such as the adapters of a run that trains nothing else.
    """
    others = _weights_beside(stored, expected)
    if others:
        raise CheckpointError(
            f"{folder}: found {len(others)} tensors that are no part of its config.json's model, expected none: "
            f"{listed(others, 3)}; of a run with adapters, take what --export-hf writes, where they are merged"
        )


def refuse_other_names(stored: set[str], expected: set[str], folder: Path) -> None:
    """Return if all that is expected is stored, and no other weights.

    Raises:
        CheckpointError: counting what is missing and what is too much, and naming ten of each.
    """
    missing, others = sorted(expected - stored), _weights_beside(stored, expected)
    found = ((missing, "tensors of this run are not in it"), (others, "tensors in it are no part of this run's model"))
    problems = [f"{len(names)} {what}: {listed(names, 10)}" for names, what in found if names]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")


def _weights_beside(stored: set[str], expected: set[str]) -> list[str]:
    return sorted(name for name in stored - expected if not name.startswith(_NO_WEIGHTS))
