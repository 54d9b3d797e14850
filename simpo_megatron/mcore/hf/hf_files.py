"""Files of a Hugging Face folder: its own files, links resolved, and the objects in its JSON files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from simpo_megatron.errors import CheckpointError, StoppedBySignal
from simpo_megatron.limits import read_bounded

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

MAX_JSON_BYTES = 16 << 20
"""No JSON file of a model folder is parsed past this size; an index of a hundred thousand tensors has 10 MB."""

_CODE_KEYS = ("auto_map", "custom_pipelines")


def own_file(folder: str | Path, name: str | Path) -> Path:
    """The file `name` of `folder`, with links resolved.

    A link may lead to a file of the folder itself, or to a blob of Hugging Face's cache. Any other file is not part of
    the model, and an export would publish it.

    Raises:
        CheckpointError: the link leads elsewhere.
    """
    path, here = Path(folder) / name, Path(folder).resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # the last: what no file can be called
        raise CheckpointError(f"{path}: found a link that leads nowhere ({error}), expected a file") from None
    is_blob = here.parent.name == "snapshots" and target.parent == here.parent.parent / "blobs"
    if here in target.parents or is_blob:
        return target
    raise CheckpointError(
        f"{path}: found a link to {target}, expected a file inside the folder, or in the blobs of Hugging Face's cache "
        "where the folder is one of its snapshots; copy the file into the folder"
    )


def read_hf_json(folder: str | Path, name: str) -> dict[str, Any]:
    """The object in `folder`/`name`.

    Raises:
        CheckpointError: the file is missing or not the folder's own, larger than MAX_JSON_BYTES, or not a JSON object.
    """
    path = Path(folder) / name
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: found no such file, expected a Hugging Face model folder with {name}")
    target = own_file(folder, name)
    try:
        content = json.loads(read_bounded(target, MAX_JSON_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}), expected a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: found invalid JSON ({error}), expected an object") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content


def load_transformers_model(auto_class: Any, folder: str | Path, **options: Any) -> Any:
    """The model in `folder` by a class of transformers such as AutoModelForCausalLM, in eval mode.

    Its code is not run, and pickled weights are not read.

    Raises:
        CheckpointError: transformers can make no model of it.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    safe = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    try:
        return auto_class.from_pretrained(folder, **safe, **options).eval()
    except StoppedBySignal:
        raise
    except Exception as error:  # Of a folder that is not sound it raises whatever it stumbles on.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"model: found no model in {folder} ({reason}), expected one that transformers loads"
        ) from error


def without_code(value: Any) -> Any:
    """`value` of JSON without the keys that name python code to be run with a model."""
    if isinstance(value, dict):
        return {key: without_code(item) for key, item in value.items() if key not in _CODE_KEYS}
    return [without_code(item) for item in value] if isinstance(value, list) else value
