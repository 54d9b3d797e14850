"""Safetensors files of a Hugging Face folder: listing them, reading their headers, writing one as a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simpo_megatron.convert.direct_io import DirectFile
from simpo_megatron.errors import CheckpointError, NumericsError
from simpo_megatron.mcore.hf import INDEX_FILE, SINGLE_FILE, own_file, read_hf_json

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Names of the dtypes that weights are read from and written in."""


_MAX_NAME = 200


@dataclass(frozen=True)
class TensorSpec:
    """The header entry of a tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """The place of one tensor in a folder, by its file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of `folder`, from their headers alone.

    Raises:
        CheckpointError: no safetensors; a file missing, damaged or outside the folder; a tensor in two files.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(Path(folder)):
        with open_safetensors(path) as file:
            for name in sorted(file.keys()):
                header = file.get_slice(name)
                if name in found:
                    raise CheckpointError(
                        f"{path}: found tensor {name} also in {found[name].file.name}, expected it once"
                    )
                found[name] = StoredTensor(path, tuple(header.get_shape()), header.get_dtype())
    return found


def open_safetensors(path: Path) -> safe_open:
    """`path` opened for reading slices; only the header is read yet.

    Raises:
        CheckpointError: the file is missing or not whole.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: found {str(error)!r}, expected a readable safetensors file") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's `folder`; links that lead outside are refused.

    Raises:
        CheckpointError: there is none, or one is missing or outside the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        names = {SINGLE_FILE}
    elif (folder / INDEX_FILE).is_file():
        weight_map = read_hf_json(folder, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: found no weight_map or an empty one, expected the file of each tensor"
            )
        names = set(map(str, weight_map.values()))
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; pickled weights ({pickles[0]}) are never read, save them as safetensors" if pickles else ""
        raise CheckpointError(f"{folder}: found no weights, expected {SINGLE_FILE} or {INDEX_FILE}{hint}")
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors") or len(name) > _MAX_NAME:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: found {name!r}, expected a safetensors file inside the folder"
            )
        if not own_file(folder, name).is_file():
            raise CheckpointError(
                f"{folder / name}: found no such file, expected the tensors that {INDEX_FILE} puts into it"
            )
    return [folder / name for name in sorted(names)]


def header_bytes(specs: Mapping[str, TensorSpec]) -> bytes:
    """The start of a safetensors file of these tensors, in this order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def require_finite(values: Tensor, where: str) -> None:
    """Return if all `values` are numbers; they are read once.

    Raises:
        NumericsError: naming `where` they are, when one is NaN or infinite.
    """
    if values.numel() and not all(map(math.isfinite, map(float, torch.aminmax(values)))):
        count = int((~torch.isfinite(values)).sum())
        raise NumericsError(f"{where}: found {count} of {values.numel()} values that are not finite, expected numbers")


def write_safetensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor]) -> None:
    """Write `tensors`, which come in the order of `specs`, holding one of them in memory at a time.

    The safetensors library writes whole files from memory only; a shard of 5 GB would be held twice.

    Raises:
        NumericsError: a tensor holds a value that is not finite, or becomes so when cast to its dtype.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    with DirectFile(path) as file:
        file.write(header_bytes(specs))
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            assert tensor.shape == spec.shape and tensor.dtype == spec.dtype, f"{name}: {tensor.shape} {tensor.dtype}"
            require_finite(tensor, f"{path.name}: {name}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
