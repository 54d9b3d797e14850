"""The index of a checkpoint's tensors: read once, as data alone, and compared with what a model expects.

The file is a pickle, which torch would let call whatever it names. Here every name in it becomes an inert record of its
arguments; torch's own objects are then built anew from values whose types were checked, and no reader of torch or
megatron is given the file.
"""

from __future__ import annotations

import pickle
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

from simpo_megatron.errors import CheckpointError, listed

_INDEX_FILE = ".metadata"
# How the names begin of what is stored beside a model's weights.
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


def read_index(folder: Path) -> Metadata:
    """The index of tensors in `folder`, whose entries lie in files of `folder`.

    Raises:
        CheckpointError: it names something that is no part of such an index, or a file elsewhere, or a value is not of
            its type.
    """
    path = folder / _INDEX_FILE
    try:
        with path.open("rb") as file:
            root = _InertUnpickler(file).load()
        sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
        return _metadata(root, sizes)
    except Exception as error:
        raise CheckpointError(f"{path}: not an index of tensors ({error})") from None


class _Inert:
    """An object of the pickle: the name of its class or function, its arguments and its state."""

    name = ""

    def __new__(cls, *arguments: Any) -> _Inert:
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    arguments: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle._Unpickler):  # in Python: no number in the file makes its memo large
    """Makes an `_Inert` of everything that an index may name, and refuses everything else by name."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._kinds: dict[str, type[_Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) not in _NAMES:
            meant = vars(_MODULES[module]).get(name) if module in _MODULES else None
            # Not what the module itself has imported.
            if not isinstance(meant, type) or meant.__module__ != module:
                raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self._kinds.setdefault(name, type(name, (_Inert,), {"name": name, "__slots__": ("arguments", "state")}))


def _metadata(root: Any, sizes: Mapping[str, int]) -> Metadata:
    """torch's index of the checked values of `root`; plans of the writer, which no reader needs, are left out.

    Args:
        sizes: of the checkpoint's files in bytes, by name.
    """
    fields = _state(root, "Metadata")
    entries = {_text(name): _entry(entry) for name, entry in _dict(fields.get("state_dict_metadata")).items()}
    storage = {_place(key): _stored(info, sizes) for key, info in _dict(fields.get("storage_data")).items()}
    for place in storage:
        if place.fqn not in entries:
            raise pickle.UnpicklingError(f"it stores {place.fqn}, which it does not describe")
    index = Metadata(entries, storage_data=storage, storage_meta=StorageMeta())
    # Shapes of tensors that megatron-core flattened.
    vars(index)["mcore_data"] = _plain(fields.get("mcore_data", {}))
    return index


def _entry(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, _Inert) and value.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _state(value, "TensorStorageMetadata")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in _list(fields["chunks"])]
    return TensorStorageMetadata(
        TensorProperties(dtype=_dtype(fields["properties"])),
        _size(fields["size"]),
        [ChunkStorageMetadata(offsets=_size(chunk["offsets"]), sizes=_size(chunk["sizes"])) for chunk in chunks],
    )


def _dtype(value: Any) -> torch.dtype:
    state = value.state if isinstance(value, _Inert) and value.name == "TensorProperties" else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise pickle.UnpicklingError("a tensor has no dtype")
    return state[0]


def _place(value: Any) -> MetadataIndex:
    fields = _state(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]), None if offset is None else _size(offset), None if index is None else _number(index)
    )


def _stored(value: Any, sizes: Mapping[str, int]) -> _StorageInfo:
    fields = _state(value, "_StorageInfo")
    file, offset, length = _text(fields["relative_path"]), _number(fields["offset"]), _number(fields["length"])
    if file not in sizes:
        raise pickle.UnpicklingError(f"it refers to the file {file}")
    if offset + length > sizes[file]:
        raise pickle.UnpicklingError(f"it refers to bytes beyond the end of {file}")
    if fields.get("transform_descriptors"):
        raise pickle.UnpicklingError("its files are compressed")
    return _StorageInfo(file, offset, length)


def _state(value: Any, name: str) -> dict[str, Any]:
    """The fields of a data class `name`."""
    state = value.state if isinstance(value, _Inert) and value.name == name else None
    if not isinstance(state, dict):
        raise pickle.UnpicklingError(f"it has {_shown(value)} for a {name}")
    return state


def _size(value: Any) -> torch.Size:
    if isinstance(value, _Inert) and value.name == "Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, (tuple, list)):
        raise pickle.UnpicklingError(f"it has {_shown(value)} for a shape")
    return torch.Size([_number(extent) for extent in value])


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise pickle.UnpicklingError(f"it has {_shown(value)} for a number")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise pickle.UnpicklingError(f"it has {_shown(value)} for a name")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise pickle.UnpicklingError(f"it has {_shown(value)} for a table")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise pickle.UnpicklingError(f"it has {_shown(value)} for a list")
    return value


def _plain(value: Any, depth: int = 8) -> Any:
    """`value` made of numbers, texts, shapes, and lists and tables of them."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, _Inert) and value.name == "Size":
        return _size(value)
    if depth and type(value) in (list, tuple):
        return type(value)(_plain(item, depth - 1) for item in value)
    if depth and type(value) is dict:
        return {_text(key): _plain(item, depth - 1) for key, item in value.items()}
    raise pickle.UnpicklingError(f"it has {_shown(value)} for a plain value")


def _shown(value: Any) -> str:
    return f"a {value.name or 'record'}" if isinstance(value, _Inert) else f"a {type(value).__name__}"


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
