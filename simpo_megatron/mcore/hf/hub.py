"""Models by their Hugging Face hub id, through transformers' download cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from simpo_megatron.errors import CheckpointError, ConfigError, StoppedBySignal

_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,200}))?")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
FILES_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
"""Patterns of a model's files that hold no weights."""
_FILES_OF_A_MODEL = ("*.safetensors", *FILES_BESIDE_WEIGHTS)


def is_hub_name(name: str | Path) -> bool:
    """True for OWNER/NAME or OWNER/NAME@REVISION, unless such a file or its first folder exists: then it is a path."""
    # os.path's function takes a name that no file can have for one of none.
    exists = any(map(os.path.exists, (name, Path(name).parent)))
    return _NAME.fullmatch(str(name)) is not None and not exists


def model_folder(name: str | Path, files: Sequence[str] = _FILES_OF_A_MODEL) -> Path:
    """The path `name` or, if it does not exist and is OWNER/NAME or OWNER/NAME@REVISION, the model's snapshot.

    The snapshot is a folder of the download cache (HF_HOME, HF_HUB_CACHE); missing files are downloaded first. With
    HF_HUB_OFFLINE=1 the network is not used. A relative path whose first folder exists is not taken for a hub id.

    Args:
        files: patterns of the files that are needed.

    Raises:
        CheckpointError: it is a hub id, and the hub or the cache has no such model; or it is no name of a folder.
    """
    found = _NAME.fullmatch(str(name))
    if found is None or not is_hub_name(name):
        _require_usable(name)
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


def _require_usable(name: str | Path) -> None:
    """Returns if `name` may be a path; that nothing is there is for others to say."""
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"model: found {str(name)[:60]!r} ({reason}), expected a folder that can be read, or a name on the hub"
        ) from None


def hub_name(model: str) -> str | None:
    """OWNER/NAME of a model in the hub's cache, given by its id or its folder there; None for any other folder."""
    in_cache = next((found for part in Path(model).parts if (found := _CACHED.fullmatch(part))), None)
    if in_cache is not None:
        return f"{in_cache[1]}/{in_cache[2]}"
    named = _NAME.fullmatch(model)
    is_cached = named is not None and any(_cached(model, name) for name in ("config.json", "adapter_config.json"))
    return named["repository"] if named is not None and is_cached else None


def file_of_model(model: str, name: str) -> Path | None:
    """The file `name` of a model, in its folder or, where it is named as on the hub, in the cache; None: not there."""
    path = Path(model) / name
    return path if model and path.is_file() else _cached(model, name)


def _cached(model: str, file: str) -> Path | None:
    """The place in the hub's cache of a `file` of a model that is named as on the hub; None where it is not there."""
    named = _NAME.fullmatch(model)
    if named is None or Path(model).parent.exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(named["repository"], file, revision=named["revision"])
    return Path(found) if isinstance(found, str) else None


def revision_of(model: str) -> str | None:
    """The revision of a model of the hub: that which is named with it, or the commit of its folder in the cache."""
    parts = Path(model).parts
    if hub_name(model) is None:
        return None
    if "snapshots" in parts[:-1]:
        return parts[parts.index("snapshots") + 1]
    named = _NAME.fullmatch(model)
    return named["revision"] if named is not None else None


def push_folder(folder: str | Path, name: str, *, private: bool) -> str:
    """The page of the hub's model `name` after the files of `folder` were pushed to it; it is made where it is not.

    Args:
        private: whether it must be private. False leaves a new one to its owner's default.

    Raises:
        ConfigError: it must be private and is public.
        Exception: what huggingface_hub raises.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(name, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repository).private:
        raise ConfigError(
            f"hub_private_repo: found {repository}, which is public, expected a private one; make it private"
        )
    return str(api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload by simpo_megatron"))
