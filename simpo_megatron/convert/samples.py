"""Digests of samples of a model's files, which tell models apart without reading them whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from simpo_megatron.limits import read_bounded
from simpo_megatron.mcore.hf import INDEX_FILE

_WEIGHTS = (".safetensors", ".distcp")
_WHOLE_FILES = ("config.json", "adapter_config.json", INDEX_FILE, "COMMIT.json")
_SAMPLE_BYTES = 1024
_MAX_SAMPLES = 12_288
"""The most reads of all files together, so that an MoE of ten thousand experts takes seconds as well."""
_MAX_HEADER_BYTES = 100 << 20
_MAX_WHOLE_BYTES = 64 << 20


def files_of_model(folder: Path) -> tuple[list[Path], list[Path]]:
    """(weight files, small files) that make the model in `folder`, tokenizer and licence apart."""
    weights = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    return weights, [folder / name for name in _WHOLE_FILES if (folder / name).is_file()]


def sampled_digests(folder: Path) -> dict[str, str]:
    """16 hex digits for each file of the model in `folder`, by its name.

    They cover sizes and headers of weight files, and the start, the end and one place between of every tensor (of many
    tensors in files with thousands). Of files that are not safetensors they cover evenly spaced pieces. Training
    changes every tensor, so two models differ in them.

    Raises: OSError, when a file cannot be read, or is larger than any of its kind.
    """
    weights, small = files_of_model(folder)
    digests = {path.name: hashlib.sha256(read_bounded(path, _MAX_WHOLE_BYTES)).hexdigest()[:16] for path in small}
    for path in weights:
        digests[path.name] = _sampled_digest(path, max(48, _MAX_SAMPLES // len(weights)))
    return digests


def _sampled_digest(path: Path, max_samples: int) -> str:
    sha256, size = hashlib.sha256(), path.stat().st_size
    sha256.update(str(size).encode())
    with path.open("rb", buffering=0) as file:
        for start, length in _samples(file.fileno(), path, size, max_samples):
            sha256.update(os.pread(file.fileno(), length, start))
    return sha256.hexdigest()[:16]


def _samples(descriptor: int, path: Path, size: int, max_samples: int) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of what is read of a file."""
    header_size = int.from_bytes(os.pread(descriptor, 8, 0), "little") if path.suffix == ".safetensors" else size
    if header_size > min(size, _MAX_HEADER_BYTES):
        header_size = size
    spans = _tensor_spans(os.pread(descriptor, header_size, 8), 8 + header_size) if header_size < size else []
    if not spans:
        yield from ((size * number // max_samples, _SAMPLE_BYTES) for number in range(max_samples))
        return
    yield 0, 8 + header_size
    step = max(1, -(-3 * len(spans) // max_samples))
    for name, start, end in spans[::step]:
        last = max(start, end - _SAMPLE_BYTES)
        # The same place on every rank, but a different one in every tensor.
        between = start + int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) % (last - start + 1)
        for place in dict.fromkeys((start, between, last)):
            yield place, min(_SAMPLE_BYTES, end - place)


def _tensor_spans(header: bytes, data_start: int) -> list[tuple[str, int, int]]:
    """(name, start, end) of each tensor; none where the header is not one, which whoever reads the file tells."""
    try:
        entries = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        return [
            (name, data_start + int(start), data_start + int(end)) for name, (start, end) in sorted(entries.items())
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
