"""The build of a store: chunks are written as they come, so that a killed build continues where it was.

The folder of a build stands beside the store, under the store's name and `.building`. It holds `pairs.bin`, and for
each finished part of it `part-00000.npz`: the lengths and rows of its pairs, its report, and the hash of its tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np

from simpo_megatron.atomic import LOCK_FILE, lock, new_file, rename
from simpo_megatron.data.store.build_report import BuildReport
from simpo_megatron.data.store.chunks import Chunk
from simpo_megatron.data.store.workers import LostWorkersError
from simpo_megatron.errors import StoppedBySignal

# A part is finished at either of these limits: the most work that a kill costs.
PART_CHUNKS = 128
PART_TOKENS = 4 << 20


@contextmanager
def build_folder(store: Path, draft: Path) -> Iterator[Path]:
    """The folder in which `store` is built; deleted at the end, unless the build ends early after a finished part.

    If another process builds the same store, it is a folder inside `draft`, from which no build continues.
    """
    folder = store.with_name(f"{store.name}.building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / LOCK_FILE)
        (folder / LOCK_FILE).stat()  # gone with the folder, where a process that built the store is done just now
    except OSError:
        folder, held = draft / "building", None
        folder.mkdir()
    try:
        yield folder
    except BaseException as error:
        is_stop = isinstance(error, (StoppedBySignal, LostWorkersError)) or not isinstance(error, Exception)
        if not (is_stop and any(folder.glob("part-*"))):
            with suppress(OSError):
                _discard(folder, draft)
        raise
    else:
        _discard(folder, draft)
    finally:
        if held is not None:
            held.release()


def _discard(folder: Path, draft: Path) -> None:
    """Deletes `folder` inside `draft`: under its own name, another build could begin in it meanwhile."""
    discarded = draft / "discarded"
    rename(folder, discarded)
    shutil.rmtree(discarded)


class StoreWriter:
    """Writes chunks in the order of their records, behind what an earlier build has left in `folder`, and counts them.

    Attributes:
        num_chunks: chunks that are written, those of the earlier build included.
        num_bytes: bytes of their records, as `Chunk` counts them.
        content: SHA-256 of the lengths and tokens of each chunk.
    """

    def __init__(self, folder: Path) -> None:
        self.report, self.max_token_id, self.content = BuildReport(), -1, hashlib.sha256()
        self.num_chunks = self.num_bytes = 0
        self._folder = folder
        self._lengths: list[np.ndarray] = []
        self._pairs: list[np.ndarray] = []
        self._part: list[Chunk] = []
        self._part_hash, self._part_tokens = hashlib.sha256(), 0
        descriptor = os.open(folder / "pairs.bin", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        self._file = os.fdopen(descriptor, "r+b")
        self._num_parts = self._take_up_parts()

    def add(self, chunk: Chunk) -> None:
        """Writes a chunk. Raises: OSError."""
        tokens = chunk.tokens.tobytes()
        # Not ndarray.tofile, which hides why a disk takes no more.
        self._file.write(tokens)
        self._count(chunk, tokens)
        self.report.add(chunk.report)
        self._part_hash.update(tokens)
        self._part_tokens += len(chunk.tokens)
        self._part.append(Chunk(np.empty(0, np.int32), chunk.lengths, chunk.pairs, chunk.report, chunk.num_bytes))
        if len(self._part) >= PART_CHUNKS or self._part_tokens >= PART_TOKENS:
            self._finish_part()

    @property
    def lengths(self) -> np.ndarray:
        """int32 [num_pairs, 3]."""
        return np.concatenate([*self._lengths, *(chunk.lengths for chunk in self._part)])

    @property
    def pairs(self) -> np.ndarray:
        """[num_pairs] of PAIR_DTYPE."""
        return np.concatenate([*self._pairs, *(chunk.pairs for chunk in self._part)])

    def move_tokens(self, path: Path) -> None:
        """Makes the file of all tokens `path`; the writer is done."""
        self.close()
        rename(self._folder / "pairs.bin", path)

    def close(self) -> None:
        """Closes the file of tokens."""
        self._file.close()

    def _count(self, chunk: Chunk, tokens: bytes) -> None:
        self.content.update(chunk.lengths.tobytes() + tokens)
        self.max_token_id = max(self.max_token_id, int(np.maximum(chunk.tokens, ~chunk.tokens).max(initial=-1)))
        self.num_chunks += 1
        self.num_bytes += chunk.num_bytes

    def _finish_part(self) -> None:
        report = BuildReport()
        for chunk in self._part:
            report.add(chunk.report)
        # Large arrays in place of many small ones, between which memory would be lost.
        self._lengths.append(np.concatenate([chunk.lengths for chunk in self._part]))
        self._pairs.append(np.concatenate([chunk.pairs for chunk in self._part]))
        self._file.flush()
        os.fsync(self._file.fileno())
        with new_file(self._path(self._num_parts)) as draft, draft.open("wb") as file:
            np.savez(
                file,
                lengths=self._lengths[-1],
                pairs=self._pairs[-1],
                chunks=np.array([(len(chunk.pairs), chunk.num_bytes) for chunk in self._part]),
                report=np.frombuffer(json.dumps(vars(report)).encode(), np.uint8),
                sha256=np.frombuffer(self._part_hash.digest(), np.uint8),
            )
        self._num_parts += 1
        self._part, self._part_hash, self._part_tokens = [], hashlib.sha256(), 0

    def _take_up_parts(self) -> int:
        """Counts what an earlier build has finished, and drops what follows the last sound part; how many there are."""
        end = 0
        for number in count():
            part = self._sound_part(number, end)
            if part is None:
                break
            for chunk in part:
                self._count(chunk, chunk.tokens.tobytes())
                self._lengths.append(chunk.lengths)
                self._pairs.append(chunk.pairs)
                self.report.add(chunk.report)
                end += chunk.tokens.nbytes
        for later in self._folder.glob("part-*"):
            if later not in {self._path(sound) for sound in range(number)}:
                later.unlink()
        self._file.truncate(end)
        self._file.seek(end)
        return number

    def _sound_part(self, number: int, start: int) -> list[Chunk] | None:
        """The chunks of a part, whose tokens begin at byte `start`; the report of all is the first one's."""
        try:
            with np.load(self._path(number)) as part:
                lengths, pairs, report = part["lengths"], part["pairs"], json.loads(part["report"].tobytes())
                chunks, digest = part["chunks"], part["sha256"].tobytes()
            self._file.seek(start)
            tokens = self._file.read(4 * int(lengths.sum(dtype=np.int64)))
            if hashlib.sha256(tokens).digest() != digest:
                return None
            ends = np.cumsum(chunks[:, 0])[:-1]
            of_chunks = np.split(lengths, ends)
            token_ends = np.cumsum([found.sum(dtype=np.int64) for found in of_chunks])[:-1]
            reports = [BuildReport(**report), *(BuildReport() for _ in ends)]
            split_tokens = np.split(np.frombuffer(tokens, np.int32), token_ends)
            fields = (split_tokens, of_chunks, np.split(pairs, ends), reports, chunks[:, 1].tolist())
            return [Chunk(*values) for values in zip(*fields, strict=True)]
        except StoppedBySignal:
            raise
        except Exception:  # Missing, or whatever its bytes have become.
            return None

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05}.npz"
