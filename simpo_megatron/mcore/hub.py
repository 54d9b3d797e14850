"""Models by their Hugging Face hub id, through transformers' download cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from simpo_megatron.errors import CheckpointError, StoppedBySignal

_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,200}))?")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_FILES_OF_A_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


def is_hub_name(name: str | Path) -> bool:
    """True for OWNER/NAME or OWNER/NAME@REVISION, unless such a file or its first folder exists: then it is a path."""
    path = Path(name)
    return _NAME.fullmatch(str(name)) is not None and not path.exists() and not path.parent.exists()


def model_folder(name: str | Path, files: Sequence[str] = _FILES_OF_A_MODEL) -> Path:
    """The path `name` or, if it does not exist and is OWNER/NAME or OWNER/NAME@REVISION, the model's snapshot.

    The snapshot is a folder of the download cache (HF_HOME, HF_HUB_CACHE); missing files are downloaded first. With
    HF_HUB_OFFLINE=1 the network is not used. A relative path whose first folder exists is not taken for a hub id.

    Args:
        files: patterns of the files that are needed.

    Raises:
        CheckpointError: it is a hub id, and the hub or the cache has no such model.
    """
    found = _NAME.fullmatch(str(name))
    if found is None or not is_hub_name(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        # huggingface_hub raises errors of several libraries, some of them internal.
        snapshot = snapshot_download(found["repository"], revision=found["revision"], allow_patterns=list(files))
    except StoppedBySignal:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model: found {str(name)!r}, expected a folder, or the name of a model that the hub or its cache has "
            f"({type(error).__name__}: {reason})"
        ) from None
    return Path(snapshot)


def hub_name(model: str) -> str | None:
    """OWNER/NAME of a model in the hub's cache, given by its id or its folder there; None for any other folder."""
    in_cache = next((found for part in Path(model).parts if (found := _CACHED.fullmatch(part))), None)
    if in_cache is not None:
        return f"{in_cache[1]}/{in_cache[2]}"
    named = _NAME.fullmatch(model)
    if named is None or Path(model).parent.exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(named["repository"], "config.json", revision=named["revision"])
    return named["repository"] if isinstance(file, str) else None
