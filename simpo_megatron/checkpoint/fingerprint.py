"""A short text by which models are told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from simpo_megatron.checkpoint import manifest

_SAMPLES_A_FILE, _SAMPLE_BYTES = 256, 1 << 16


def model_fingerprint(folder: Path) -> str:
    """Hex digits that differ when config.json or the weights in `folder` differ.

    Of a large file, 256 pieces spread over it are read: training moves every weight, and reading all of them takes
    minutes.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    # The record of a checkpoint holds the hashes of its files.
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob(manifest.RECORD_FILE)]):
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
