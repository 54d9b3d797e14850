"""Tokenised pairs on disk, in megatron-core's IndexedDataset files, which ranks read pair by pair.

A store is a folder: `pairs.bin` and `pairs.idx` (three sequences per document: prompt, chosen, rejected), `pairs.npy`
(one row per pair: its origin and the tokens cut) and `store.json` (fingerprints, counts and the hashes of the others).
It appears whole, by one rename, or not at all. A token of a response that the assistant did not write is stored as its
complement, `~id`; only stores with `responses: assistant` have any.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import weakref
import zlib
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpo_megatron.atomic import new_folder, remove_folder
from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import ENDLESS_TEMPLATE, UNUSABLE_REASONS
from simpo_megatron.data.sources import first_records, source_identity
from simpo_megatron.data.store.build_report import BuildReport
from simpo_megatron.data.store.chunks import encoded_chunks, report_on_records
from simpo_megatron.data.store.read_progress import ReadProgress
from simpo_megatron.data.store.store_seal import DamagedStoreError, damaged, read_sealed, seal
from simpo_megatron.data.store.store_writer import StoreWriter, build_folder
from simpo_megatron.data.tokenization import TokenizedPair, tokenizer_identity
from simpo_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOGGER = logging.getLogger(__name__)

# Raised when older stores can no longer be read. Columns that were added to pairs.npy may be missing.
FORMAT_VERSION = 3
# Raised when records or templates are read otherwise, so that a store of the older reading is not taken for a new one.
READING_VERSION = 3
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INT32_CODE = 4


class PairStore:
    """The tokenised pairs of one source, read from disk: `store[i]`, `len(store)`, lengths [num_pairs, 3].

    Args:
        verify: look at every byte; only once for each copy of the files, for it reads them whole.

    Raises: DamagedStoreError when the files are not those that were built; from `store[i]`, when the bytes of that pair
        have changed since.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        sidecar = read_sealed(folder, verify=verify)
        try:
            self.fingerprint: str = sidecar["content_sha256"]
            self.max_token_id: int = sidecar["max_token_id"]
            self.report = BuildReport(**sidecar["report"])
            lengths, starts = _parse_index((folder / "pairs.idx").read_bytes())
            self.pairs = np.load(folder / "pairs.npy", mmap_mode="r")
            # Not mapped: reading a mapped page of a file that was truncated meanwhile would kill the process.
            self._descriptor = os.open(folder / "pairs.bin", os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            num_bytes = os.fstat(self._descriptor).st_size
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise damaged(folder, error) from None
        self.lengths = lengths.reshape(-1, 3)
        self._starts = starts
        if len(self.lengths) != len(self.pairs) or num_bytes != 4 * lengths.sum(dtype=np.int64):
            raise damaged(folder, "its files have the sizes of different stores")
        self._checksums = np.array(self.pairs["crc32"]) if "crc32" in self.pairs.dtype.names else None

    @property
    def name(self) -> str:
        """The name of the source's file, without its ending."""
        return self.folder.name.rsplit("-", 1)[0]

    @property
    def score_gaps(self) -> np.ndarray:
        """The difference of the scores of each pair's responses: float32 [num_pairs], nan without scores."""
        if "score_gap" in self.pairs.dtype.names:
            return self.pairs["score_gap"]
        return np.full(len(self), np.nan, np.float32)

    @property
    def counted(self) -> np.ndarray:
        """Tokens of each pair's chosen and rejected responses that the assistant wrote: int32 [num_pairs, 2]."""
        return self.pairs["counted"] if "counted" in self.pairs.dtype.names else self.lengths[:, 1:]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedPair:
        ends = np.cumsum(self.lengths[index])
        try:
            content = os.pread(self._descriptor, 4 * int(ends[2]), 4 * int(self._starts[index]))
        except OSError as error:
            raise damaged(self.folder, f"pair {index} cannot be read: {error.strerror}") from None
        is_known = self._checksums is None or zlib.crc32(content) == self._checksums[index]
        if len(content) != 4 * ends[2] or not is_known:
            raise damaged(self.folder, f"the bytes of pair {index} changed while the store was in use")
        return TokenizedPair.from_marked(*np.split(np.frombuffer(content, np.int32), ends[:2]))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PairStore, verify=False), (self.folder,)


def open_store(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None,
    options: PairOptions,
    cache_dir: str,
    *,
    build: bool = True,
    num_workers: int = 0,
    tokenizer_digest: str,
) -> PairStore:
    """Returns the PairStore of `path` (see `Source`), building it under `cache_dir` when it is not there.

    A store is reused when the file (size and time of change), the tokenizer, its chat template, the options,
    this format and the way records are read are all unchanged, and all its bytes are as they were built; a damaged
    one is built anew. `build=False`, for the ranks that come after the one that built, never writes and trusts what
    that one has verified. `num_workers` processes tokenise; 0 takes one for every 16 MiB, up to the number of cores.
    `tokenizer_digest` is that of `digest_of_tokenizer`, which takes up to a second; `build=False` needs no tokenizer.

    Raises: DataError for a bad record (`file:line`), a file without a single pair, a missing store with
    `build=False`, or a cache that cannot be written.
    """
    identity = {
        "format": FORMAT_VERSION,
        "reading": READING_VERSION,
        "source": source_identity(path),
        "options": _identity_of(options),
        "tokenizer": tokenizer_digest,
    }
    folder = Path(cache_dir) / f"{_safe_name(path)}-{_digest(identity)[:16]}"
    if build:
        assert tokenizer is not None, "there is nothing to tokenise with"
        return _opened(folder) or _build_store(folder, path, tokenizer, options, num_workers, identity)
    if not folder.exists():
        raise DataError(
            f"{path}: found no tokenized store at {folder}, expected the one that the first rank of this "
            "node wrote; give the ranks of a node one data_cache, and one copy of the file"
        )
    return PairStore(folder, verify=False)


def check_first_records(path: str, options: PairOptions) -> None:
    """Raises DataError as a build would for a file without records, or one whose first record stops the build.

    It takes neither a tokenizer nor torch, and looks at files that are here.
    """
    for file, first in first_records(path, options):
        if first is None:
            _check_use(BuildReport(), file, options)
        else:
            _check_policy(report_on_records([first], file, options), options)


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> str:
    """Returns the hash of all of a tokenizer that a store depends on, and of its chat template."""
    return _digest(tokenizer_identity(tokenizer, options))


def _opened(folder: Path) -> PairStore | None:
    """Returns the store in `folder`; None where there is none, or only a damaged one, which then is gone."""
    try:
        found = folder.stat().st_ino
    except FileNotFoundError:
        return None
    try:
        return PairStore(folder)
    except DamagedStoreError as error:
        try:
            remove_folder(folder, inode=found)
        except FileNotFoundError:
            return None  # another process has found it damaged, too
        except OSError:
            raise error from None
        _LOGGER.warning("%s: removed, and built anew from its source", str(error).rpartition("; ")[0])
        return None


def _build_store(
    folder: Path,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    options: PairOptions,
    num_workers: int,
    identity: dict[str, Any],
) -> PairStore:
    try:
        with new_folder(folder, first_wins=True) as draft:
            facts = _write_store(folder, draft, path, tokenizer, options, num_workers) | {"identity": identity}
            if source_identity(path) != identity["source"]:
                raise DataError(
                    f"{path}: found a change while it was read, expected a complete file; start again once it is "
                    "complete"
                )
            seal(draft, facts)
    except OSError as error:
        raise DataError(
            f"data_cache: found {folder.parent}, where the tokens of {path} could not be written "
            f"({error.strerror or error}), expected a folder with room that can be written; name one with --data-cache"
        ) from None
    # Another process may have written the same store first; its bytes are verified like any other's.
    return PairStore(folder)


def _write_store(
    folder: Path,
    draft: Path,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    options: PairOptions,
    num_workers: int,
) -> dict[str, Any]:
    """Writes all files of the store but its sidecar to `draft`; returns the facts for the sidecar."""
    with (
        build_folder(folder, draft) as working,
        closing(StoreWriter(working)) as writer,
        ReadProgress(path) as progress,
    ):
        if writer.num_chunks:
            _LOGGER.info("%s: goes on behind the %d records of a build that was stopped", path, writer.report.num_lines)
        progress.advance(writer.report.num_lines, writer.num_bytes)
        for chunk in encoded_chunks(path, tokenizer, options, num_workers, skip=writer.num_chunks):
            _check_policy(chunk.report, options)
            writer.add(chunk)
            progress.advance(chunk.report.num_lines, chunk.num_bytes)
        report = writer.report
        _check_use(report, path, options)
        (draft / "pairs.idx").write_bytes(_index_bytes(writer.lengths.ravel()))
        np.save(draft / "pairs.npy", writer.pairs)
        writer.move_tokens(draft / "pairs.bin")
    return {
        "report": vars(report),
        "max_token_id": writer.max_token_id,
        "content_sha256": writer.content.hexdigest(),
    }


def _check_use(report: BuildReport, path: str, options: PairOptions) -> None:
    num_bad = sum(count for reason, count in report.dropped.items() if reason not in UNUSABLE_REASONS)
    if num_bad > options.max_bad_fraction * report.num_lines:
        raise DataError(
            f"{path}: found {num_bad} of {report.num_lines} records malformed, expected at most the fraction "
            f"max_bad_fraction {options.max_bad_fraction:g}; " + "; ".join(report.lines()[1:]).strip()
        )
    if not report.num_used:
        raise DataError(
            f"{path}: found no usable pair, expected at least one; "
            + "; ".join(line.strip() for line in report.lines())
        )


def _check_policy(report: BuildReport, options: PairOptions) -> None:
    malformed = [reason for reason in report.dropped if reason not in UNUSABLE_REASONS]
    if malformed and (options.bad_record == "error" or ENDLESS_TEMPLATE in malformed):
        first = min(malformed, key=lambda reason: int(report.place(reason).rpartition(":")[2]))
        raise DataError(
            f"{report.first[first]}; fix the record, or set bad_record: skip to drop and count such records"
        )


def _index_bytes(lengths: np.ndarray) -> bytes:
    """Returns an IndexedDataset index of int32 sequences of `lengths`, three to a document.

    Source: NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py, _IndexWriter.
    """
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(4 * lengths[:-1].astype(np.int64), out=pointers[1:])
    documents = np.arange(0, len(lengths) + 1, 3, dtype=np.int64)
    header = struct.pack("<9sQBQQ", INDEX_MAGIC, INDEX_VERSION, INT32_CODE, len(lengths), len(documents))
    return b"".join((header, lengths.astype(np.int32, copy=False).data, pointers.data, documents.data))


def _parse_index(index: bytes) -> tuple[np.ndarray, np.ndarray]:
    start = struct.calcsize("<9sQBQQ")
    _, _, _, num_sequences, _ = struct.unpack("<9sQBQQ", index[:start])
    lengths = np.frombuffer(index, np.int32, num_sequences, start)
    pointers = np.frombuffer(index, np.int64, num_sequences, start + lengths.nbytes)
    # Copies of what is needed, for a view would keep the whole index in memory.
    return lengths.copy(), pointers[::3] // 4


def _identity_of(options: PairOptions) -> dict[str, Any]:
    """Returns the options that a store depends on, named as when its format was made, so that older ones are found."""
    named = asdict(options)
    if options.responses == "last":
        del named["responses"]
    return named


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _safe_name(path: str) -> str:
    name = Path(path).name.split(".")[0]
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:64]
