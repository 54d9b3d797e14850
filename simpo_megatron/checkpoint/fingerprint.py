"""Fingerprints of models: a hash of every byte of the weights, computed once per file version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from simpo_megatron.atomic import write_text
from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.model_source import ModelSource
from simpo_megatron.errors import CheckpointError
from simpo_megatron.limits import read_bounded
from simpo_megatron.mcore.hf import MAX_JSON_BYTES

_VERSION = "sha256:"
_SAMPLES_A_FILE, _SAMPLE_BYTES = 256, 1 << 16
_NUM_THREADS = 8


def model_fingerprint(folder: Path, memory: Path | None) -> str:
    """Text that differs when config.json, or a byte of the weights in `folder`, differs. The folder's name is not used.

    Args:
        memory: a JSON file that caches the hash of each weight file under its size, inode and times, one of which
            every change of the file changes. Created if missing; not used if it cannot be written. None: none is used.
    """
    known = {} if memory is None else _read(memory)
    files = _weight_files(folder)
    # Taken before the read, so that a change during it is noticed the next time.
    states = [_state(path) for path in files]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        read = threads.map(lambda path, state: known.get(state) or manifest.digest_file(path).sha256, files, states)
    hashes = list(read)
    found = dict(zip(states, hashes, strict=True))
    if memory is not None and not found.items() <= known.items():
        _write(memory, known | found)
    digest = hashlib.sha256(read_bounded(_description_file(folder), MAX_JSON_BYTES))
    for path, sha256 in zip(files, hashes, strict=True):
        digest.update(f"{path.name} {sha256}".encode())
    return _VERSION + digest.hexdigest()


def source_fingerprint(source: ModelSource, memory: Path | None = None) -> str:
    """The fingerprint of the base model and of all adapters on it, as `model_fingerprint`."""
    return "+".join(model_fingerprint(folder, memory) for folder in (source.base, *source.adapters))


def require_bases(source: ModelSource, memory: Path | None = None) -> None:
    """Return if the models beneath a run's adapters are those that they were trained on.

    Raises:
        CheckpointError: one of them is another.
    """
    for number, folder in enumerate(source.adapters):
        if not (folder / manifest.RECORD_FILE).is_file():
            continue
        expected = manifest.read(folder).facts["model"].get("base_model")
        beneath = ModelSource(source.base, source.adapters[:number])
        if is_of_this_form(expected) and source_fingerprint(beneath, memory) != expected:
            raise CheckpointError(
                f"{folder}: found adapters that were trained on another model than {beneath.last}, expected the same; "
                "restore that model"
            )


def is_of_this_form(fingerprint: object) -> bool:
    """True for a fingerprint by `model_fingerprint`, False for one of an earlier version."""
    return isinstance(fingerprint, str) and fingerprint.startswith(_VERSION)


def sampled_fingerprint(folder: Path) -> str:
    """Hex digits that training changes. Of a large file only 256 pieces are hashed, so a small edit may be missed.

    It takes a second where `model_fingerprint` takes minutes. Checkpoints of earlier versions have it.
    """
    digest = hashlib.sha256(read_bounded(folder / "config.json", MAX_JSON_BYTES))
    for path in _weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if size <= _SAMPLES_A_FILE * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for start in np.linspace(0, size - _SAMPLE_BYTES, _SAMPLES_A_FILE).astype(int):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _description_file(folder: Path) -> Path:
    """The file that says what the weights are: of a model, of adapters, or of a checkpoint of Megatron-LM."""
    files = [folder / name for name in ("config.json", "adapter_config.json", "metadata.json")]
    return next((file for file in files if file.is_file()), files[0])


def _weight_files(folder: Path) -> list[Path]:
    # The record of a checkpoint holds the hashes of its files; checkpoints of others have none.
    record = folder / manifest.RECORD_FILE
    found = [*folder.glob("*.safetensors"), *([record] if record.is_file() else folder.glob("*.distcp"))]
    return sorted(path for path in found if path.is_file())


def _state(path: Path) -> str:
    """The file and what of it changes with its content; `ctime` cannot be set back."""
    found = path.stat()
    return f"{path.resolve()} {found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"


def _read(memory: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(read_bounded(memory, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    is_whole = isinstance(content, dict) and all(isinstance(value, str) for value in content.values())
    return content if is_whole else {}


def _write(memory: Path, hashes: Mapping[str, str]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_text(memory, json.dumps(hashes, indent=1))
    except OSError:
        # The cache only saves time.
        return
