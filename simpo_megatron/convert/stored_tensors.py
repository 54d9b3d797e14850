"""Safetensors files of a Hugging Face folder as they are found: their names, and the tensors in their headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore.hf import INDEX_FILE, SINGLE_FILE, own_file, read_hf_json

_MAX_NAME = 200


@dataclass(frozen=True)
class StoredTensor:
    """The place of one tensor in a folder, by its file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of `folder`, from their headers alone; torch is not needed for them.

    Raises:
        CheckpointError: no safetensors; a file missing, damaged or outside the folder; a tensor in two files.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(Path(folder)):
        with open_safetensors(path, "np") as file:
            for name in sorted(file.keys()):
                header = file.get_slice(name)
                if name in found:
                    raise CheckpointError(
                        f"{path}: found tensor {name} also in {found[name].file.name}, expected it once"
                    )
                found[name] = StoredTensor(path, tuple(header.get_shape()), header.get_dtype())
    return found


def open_safetensors(path: Path, framework: str = "pt") -> safe_open:
    """`path` opened for reading slices, which are tensors of `framework`; only the header is read yet.

    Raises:
        CheckpointError: the file is missing or not whole.
    """
    try:
        return safe_open(path, framework=framework)
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
