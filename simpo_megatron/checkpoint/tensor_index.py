"""The index of a checkpoint's tensors: read once, as data only, and compared with what a model expects.

The file is a pickle, and torch would call any function that it names. Here every name becomes an inert record of its
arguments. torch's own objects are then rebuilt from values whose types were checked. No reader of torch or megatron
gets the file.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata, planner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from simpo_megatron.checkpoint.inert_pickle import Inert, InertUnpickler, PlainValues, number, shown, size_of
from simpo_megatron.errors import CheckpointError, StoppedBySignal, listed

_INDEX_FILE = ".metadata"
# Prefixes of the keys that are not a model's weights.
_NO_WEIGHTS = ("optimizer.", "rng.", "common_state")
# An index names data classes of these modules, and the single names.
_MODULES = {module.__name__: module for module in (metadata, planner)}
_NAMES = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def read_index(folder: Path, sizes: Mapping[str, int] | None = None) -> Metadata:
    """The index of tensors in `folder`, whose entries lie in files of `folder`.

    Args:
        sizes: of these files in bytes, by name, where they are known; else the folder is listed.

    Raises:
        CheckpointError: it names something that is no part of such an index, or a file elsewhere, or a value is not of
            its type.
    """
    path = folder / _INDEX_FILE
    try:
        with path.open("rb") as file:
            root = InertUnpickler(file, _knows).load()
        if sizes is None:
            sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
        return _metadata(root, sizes)
    except StoppedBySignal:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: found no index of tensors ({error}), expected that of a torch_dist checkpoint"
        ) from None


def _knows(module: str, name: str) -> bool:
    if (module, name) in _NAMES:
        return True
    meant = vars(_MODULES[module]).get(name) if module in _MODULES else None
    # Only classes that the module defines, not its imports.
    return isinstance(meant, type) and meant.__module__ == module


def _metadata(root: Any, sizes: Mapping[str, int]) -> Metadata:
    """torch's index, built from the checked values of `root`, without the writer's plans, which no reader needs.

    Args:
        sizes: of the checkpoint's files in bytes, by name.
    """
    fields = _state(root, "Metadata")
    storage = {_place(key): _stored(info, sizes) for key, info in _dict(fields.get("storage_data")).items()}
    used: Counter[str] = Counter()
    for info in storage.values():
        used[info.relative_path] += info.length
    for file, num_bytes in used.items():
        if num_bytes > sizes[file]:
            raise pickle.UnpicklingError(f"its entries share bytes of {file}")
    described = _dict(fields.get("state_dict_metadata"))
    # A pickle may refer to one list many times, and each reference would copy it.
    if sum(map(_num_chunks, described.values())) > len(storage):
        raise pickle.UnpicklingError("it describes more parts of tensors than it stores")
    entries = {_text(name): _entry(entry) for name, entry in described.items()}
    for place in storage:
        if place.fqn not in entries:
            raise pickle.UnpicklingError(f"it stores {place.fqn}, which it does not describe")
    index = Metadata(entries, storage_data=storage, storage_meta=StorageMeta())
    # Shapes of tensors that megatron-core flattened.
    vars(index)["mcore_data"] = PlainValues(size_of).of(fields.get("mcore_data", {}))
    return index


def _num_chunks(value: Any) -> int:
    fields = value.state if isinstance(value, Inert) and isinstance(value.state, dict) else {}
    return len(_list(fields.get("chunks", [])))


def _entry(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, Inert) and value.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _state(value, "TensorStorageMetadata")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in _list(fields["chunks"])]
    return TensorStorageMetadata(
        TensorProperties(dtype=_dtype(fields["properties"])),
        size_of(fields["size"]),
        [ChunkStorageMetadata(offsets=size_of(chunk["offsets"]), sizes=size_of(chunk["sizes"])) for chunk in chunks],
    )


def _dtype(value: Any) -> torch.dtype:
    state = value.state if isinstance(value, Inert) and value.name == "TensorProperties" else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise pickle.UnpicklingError("a tensor has no dtype")
    return state[0]


def _place(value: Any) -> MetadataIndex:
    fields = _state(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]), None if offset is None else size_of(offset), None if index is None else number(index)
    )


def _stored(value: Any, sizes: Mapping[str, int]) -> _StorageInfo:
    fields = _state(value, "_StorageInfo")
    file, offset, length = _text(fields["relative_path"]), number(fields["offset"]), number(fields["length"])
    if file not in sizes:
        raise pickle.UnpicklingError(f"it refers to the file {file}")
    if offset + length > sizes[file]:
        raise pickle.UnpicklingError(f"it refers to bytes beyond the end of {file}")
    if fields.get("transform_descriptors"):
        raise pickle.UnpicklingError("its files are compressed")
    return _StorageInfo(file, offset, length)


def _state(value: Any, name: str) -> dict[str, Any]:
    """The fields of a data class `name`."""
    state = value.state if isinstance(value, Inert) and value.name == name else None
    if not isinstance(state, dict):
        raise pickle.UnpicklingError(f"it has {shown(value)} for a {name}")
    return state


def _text(value: Any) -> str:
    if type(value) is not str:
        raise pickle.UnpicklingError(f"it has {shown(value)} for a name")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise pickle.UnpicklingError(f"it has {shown(value)} for a table")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise pickle.UnpicklingError(f"it has {shown(value)} for a list")
    return value


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
        raise CheckpointError(
            f"{folder}: found other tensors than this run's, expected the same names: {'; '.join(problems)}"
        )


def _weights_beside(stored: set[str], expected: set[str]) -> list[str]:
    return sorted(name for name in stored - expected if not name.startswith(_NO_WEIGHTS))
