"""The seal of a token store: hashes of its files, taken when it is built and compared when it is opened.

A store is a cache that this package writes. The seal finds any accidental change by disks, copies or people; it is not
a signature.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simpo_megatron.atomic import LOCK_FILE
from simpo_megatron.errors import DataError

SIDECAR_FILE = "store.json"
_BLOCK_BYTES = 16 << 20
_READ_BYTES = 128 << 10
_MAX_SIDECAR_BYTES = 64 << 20
_MAX_THREADS = 8


class DamagedStoreError(DataError):
    """A store whose files are not those that were built."""


def damaged(folder: Path, found: object) -> DamagedStoreError:
    """The error for the store in `folder`; `found` says what is wrong."""
    return DamagedStoreError(
        f"{folder}: found a damaged token store ({found}), expected it as it was built; delete the folder, and the "
        "next run builds it anew"
    )


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the sidecar of `folder`: `facts`, JSON values, with the hashes of all other files, and a hash of itself."""
    files = {path.name: _block_hashes(path) for path in sorted(folder.iterdir()) if path.name != LOCK_FILE}
    record = json.loads(json.dumps({**facts, "files": files}))
    (folder / SIDECAR_FILE).write_text(json.dumps({**record, "sha256": _hash_of(record)}, indent=1))


def read_sealed(folder: Path, *, verify: bool) -> dict[str, Any]:
    """The facts of a store whose sidecar is whole; with `verify`, every byte of its other files is looked at.

    Raises: DamagedStoreError naming the file that is not as it was sealed.
    """
    path = folder / SIDECAR_FILE
    try:
        if path.stat().st_size > _MAX_SIDECAR_BYTES:
            raise ValueError(f"{SIDECAR_FILE} has {path.stat().st_size} bytes")
        record = json.loads(path.read_bytes())
        if record.pop("sha256") != _hash_of(record):
            raise ValueError(f"the hash of {SIDECAR_FILE} does not match")
        for name, hashes in record["files"].items():
            if verify and _block_hashes(folder / name) != hashes:
                raise ValueError(f"the bytes of {name} have changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(folder, getattr(error, "strerror", None) or error) from None
    return record


def _block_hashes(path: Path) -> list[str]:
    """Hex digits of each block of a file in turn; hashing leaves Python's lock alone, so cores share the blocks."""
    num_blocks = -(-path.stat().st_size // _BLOCK_BYTES)
    num_threads = max(1, min(num_blocks, _MAX_THREADS, len(os.sched_getaffinity(0))))
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(num_threads) as pool:
        blocks = (number * _BLOCK_BYTES for number in range(num_blocks))
        return list(pool.map(lambda start: _hash_of_block(file.fileno(), start), blocks))


def _hash_of_block(descriptor: int, start: int) -> str:
    digest, end = hashlib.sha256(), start + _BLOCK_BYTES
    buffer = memoryview(bytearray(min(_READ_BYTES, _BLOCK_BYTES)))
    while start < end and (count := os.preadv(descriptor, [buffer[: end - start]], start)):
        digest.update(buffer[:count])
        start += count
    return digest.hexdigest()


def _hash_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
