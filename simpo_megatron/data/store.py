"""Tokenised pairs on disk, in megatron-core's IndexedDataset files, of which ranks read a pair at a time.

A store is a folder: `pairs.bin` and `pairs.idx` (three sequences per document: prompt, chosen, rejected),
`pairs.npy` (one row per pair: where it came from and what was cut) and `store.json` (fingerprints, counts and the
hashes of the others). It appears whole, by one rename, or not at all. A token of a response that the assistant did not
write stands there as its complement, `~id`; only stores of `responses: assistant` hold any.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpo_megatron.atomic import new_folder, remove_folder
from simpo_megatron.data.build_report import BuildReport
from simpo_megatron.data.findings import FINDINGS
from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import (
    ENDLESS_TEMPLATE,
    UNUSABLE_REASONS,
    BadRecord,
    PreferenceRecord,
    check_row,
    parse_json,
    to_record,
)
from simpo_megatron.data.sources import RawRecord, read_raw, source_identity
from simpo_megatron.data.store_seal import DamagedStoreError, damaged, read_sealed, seal
from simpo_megatron.data.tokenization import PairTokenizer, TokenizedPair, tokenizer_identity, use_one_thread
from simpo_megatron.data.workers import map_in_processes
from simpo_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOGGER = logging.getLogger(__name__)

# It changes when stores of before can no longer be read. Columns that are new in pairs.npy may be missing.
FORMAT_VERSION = 3
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INT32_CODE = 4
CHUNK_RECORDS = 64
CHUNK_BYTES = 1 << 20
# Below this many bytes, starting processes takes longer than tokenising in this one.
MIN_BYTES_PER_WORKER = 16 << 20
PAIR_DTYPE = np.dtype(
    [
        ("line", np.int64),
        ("prompt_key", np.uint64),
        ("lost", np.int32, 3),
        ("score_gap", np.float32),
        ("counted", np.int32, 2),
        ("crc32", np.uint32),
    ]
)


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
            lengths, pointers = _parse_index((folder / "pairs.idx").read_bytes())
            self.pairs = np.load(folder / "pairs.npy", mmap_mode="r")
            # Not mapped: a page of a file that was cut short meanwhile would kill the process.
            self._descriptor = os.open(folder / "pairs.bin", os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            num_bytes = os.fstat(self._descriptor).st_size
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise damaged(folder, error) from None
        self.lengths = lengths.reshape(-1, 3)
        self._starts = pointers[::3] // 4
        if len(self.lengths) != len(self.pairs) or num_bytes != 4 * lengths.sum(dtype=np.int64):
            raise damaged(folder, "its files have the sizes of different stores")
        self._checksums = np.array(self.pairs["crc32"]) if "crc32" in self.pairs.dtype.names else None

    @property
    def name(self) -> str:
        """The name of the source's file, without its ending."""
        return self.folder.name.rsplit("-", 1)[0]

    @property
    def score_gaps(self) -> np.ndarray:
        """By how much each pair's responses were scored apart: float32 [num_pairs], nan without scores."""
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
    tokenizer: PreTrainedTokenizerBase,
    options: PairOptions,
    cache_dir: str,
    *,
    build: bool = True,
    num_workers: int = 0,
) -> PairStore:
    """Returns the PairStore of `path` (see `Source`), building it under `cache_dir` when it is not there.

    A store is reused when the file (size and time of change), the tokenizer, its chat template, the options
    and this format are all unchanged, and all its bytes are as they were built; a damaged one is built anew.
    `build=False`, for the ranks that come after the one that built, never writes and trusts what that one has
    verified. `num_workers` processes tokenise; 0 takes one for every 16 MiB, up to the number of cores.

    Raises: DataError for a bad record (`file:line`), a file without a single pair, a missing store with
    `build=False`, or a cache that cannot be written.
    """
    identity = {
        "format": FORMAT_VERSION,
        "source": source_identity(path),
        "options": _identity_of(options),
        "tokenizer": _digest(tokenizer_identity(tokenizer, options)),
    }
    folder = Path(cache_dir) / f"{_safe_name(path)}-{_digest(identity)[:16]}"
    if build:
        return _opened(folder) or _build_store(folder, path, tokenizer, options, num_workers, identity)
    if not folder.exists():
        raise DataError(
            f"{path}: found no tokenized store at {folder}, expected the one that the first rank of this "
            "node wrote; give the ranks of a node one data_cache, and one copy of the file"
        )
    return PairStore(folder, verify=False)


def _opened(folder: Path) -> PairStore | None:
    """Returns the store in `folder`; None where there is none, or only a damaged one, which then is gone."""
    if not folder.exists():
        return None
    try:
        return PairStore(folder)
    except DamagedStoreError as error:
        try:
            remove_folder(folder)
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
            facts = _write_store(draft, path, tokenizer, options, num_workers) | {"identity": identity}
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
    # Another process may have been first with the same store; its bytes are as little known as those of any other.
    return PairStore(folder)


def _write_store(
    folder: Path, path: str, tokenizer: PreTrainedTokenizerBase, options: PairOptions, num_workers: int
) -> dict[str, Any]:
    report, content, max_token_id = BuildReport(), hashlib.sha256(), -1
    lengths, rows = [], []
    with open(folder / "pairs.bin", "wb") as file:
        for chunk in _encoded_chunks(path, tokenizer, options, num_workers):
            _check_policy(chunk.report, options)
            report.add(chunk.report)
            tokens = chunk.tokens.tobytes()
            content.update(chunk.lengths.tobytes() + tokens)
            # Not ndarray.tofile, which hides why a disk takes no more.
            file.write(tokens)
            max_token_id = max(max_token_id, int(np.maximum(chunk.tokens, ~chunk.tokens).max(initial=-1)))
            lengths.append(chunk.lengths)
            rows.append(chunk.pairs)
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
    index = _index_bytes(np.concatenate(lengths).ravel())
    (folder / "pairs.idx").write_bytes(index)
    np.save(folder / "pairs.npy", np.concatenate(rows))
    return {
        "report": vars(report),
        "max_token_id": max_token_id,
        "content_sha256": content.hexdigest(),
    }


def _check_policy(report: BuildReport, options: PairOptions) -> None:
    malformed = [reason for reason in report.dropped if reason not in UNUSABLE_REASONS]
    if malformed and (options.bad_record == "error" or ENDLESS_TEMPLATE in malformed):
        first = min(malformed, key=lambda reason: int(report.place(reason).rpartition(":")[2]))
        raise DataError(
            f"{report.first[first]}; fix the record, or set bad_record: skip to drop and count such records"
        )


@dataclass
class _Chunk:
    tokens: np.ndarray
    lengths: np.ndarray
    pairs: np.ndarray
    report: BuildReport


def encode_chunk(raw: list[RawRecord], path: str, pair_tokenizer: PairTokenizer, options: PairOptions) -> _Chunk:
    """Returns the tokens of some consecutive raw records, and what became of each."""
    report = BuildReport(num_lines=len(raw))
    lines: list[int] = []
    records: list[PreferenceRecord] = []
    bad: dict[int, BadRecord] = {}
    for item in raw:
        try:
            if isinstance(item.row, BadRecord):
                raise item.row
            if item.row is None:
                raise BadRecord("too_long_record", f"more than max_record_bytes = {options.max_record_bytes} bytes")
            row = parse_json(item.row, item.last) if isinstance(item.row, bytes) else check_row(item.row)
            record = to_record(row, options)
            report.note_reading(record.reading, f"{path}:{item.line}")
            records.append(record)
            lines.append(item.line)
        except BadRecord as error:
            bad[item.line] = error
    parts: list[np.ndarray] = []
    lengths, rows = [], []
    for line, record, encoded in zip(lines, records, pair_tokenizer.encode(records), strict=True):
        if isinstance(encoded, BadRecord):
            bad[line] = encoded
            continue
        ids = encoded.pair.marked()
        parts += ids
        lengths.append([len(part) for part in ids])
        counted = [int((part >= 0).sum()) for part in ids[1:]]
        checksum = zlib.crc32(np.concatenate(ids).astype(np.int32, copy=False).tobytes())
        rows.append((line, _prompt_key(record), encoded.lost, record.reading.score_gap, counted, checksum))
        report.notes.update(encoded.notes)
        for note in encoded.notes:
            report.first.setdefault(note, f"{path}:{line}: {note}: {FINDINGS.get(note, note)}")
        report.notes.update(f"with a cut {name}" for name, lost in zip(_PARTS, encoded.lost, strict=True) if lost)
    report.num_used = len(rows)
    for line, problem in sorted(bad.items()):
        report.dropped[problem.reason] += 1
        report.first.setdefault(problem.reason, f"{path}:{line}: {problem.reason}: {problem.detail}")
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return _Chunk(tokens, np.array(lengths, np.int32).reshape(-1, 3), np.array(rows, PAIR_DTYPE), report)


_PARTS = ("prompt", "chosen", "rejected")


def _encoded_chunks(
    path: str, tokenizer: PreTrainedTokenizerBase, options: PairOptions, num_workers: int
) -> Iterator[_Chunk]:
    chunks = _chunked(read_raw(path, options))
    num_workers = num_workers or _workers_worth_starting(path)
    if num_workers == 1:
        pair_tokenizer = PairTokenizer(tokenizer, options)
        for chunk in chunks:
            yield encode_chunk(chunk, path, pair_tokenizer, options)
        return
    yield from map_in_processes(
        _work,
        chunks,
        num_workers=num_workers,
        prepare=_start_worker,
        arguments=(tokenizer, path, options),
        describe=partial(_lines, path),
    )


# Of a worker process: the file, and how its records become tokens.
_worker: tuple[str, PairTokenizer, PairOptions]


def _start_worker(tokenizer: PreTrainedTokenizerBase, path: str, options: PairOptions) -> None:
    global _worker
    use_one_thread()
    _worker = (path, PairTokenizer(tokenizer, options), options)


def _work(chunk: list[RawRecord]) -> _Chunk:
    return encode_chunk(chunk, *_worker)


def _lines(path: str, first: list[RawRecord], last: list[RawRecord]) -> str:
    return f"{path}:{first[0].line} to {last[-1].line}"


def _workers_worth_starting(path: str) -> int:
    identity = source_identity(path)
    num_bytes = sum(size for _, size, _ in identity.get("files", ()))
    return max(1, min(len(os.sched_getaffinity(0)), num_bytes // MIN_BYTES_PER_WORKER))


def _chunked(records: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    chunk, num_bytes = [], 0
    for record in records:
        chunk.append(record)
        num_bytes += len(record.row) if isinstance(record.row, bytes) else 0
        # A record that is too long is reported before the rest of its line is read.
        if len(chunk) == CHUNK_RECORDS or num_bytes >= CHUNK_BYTES or record.row is None:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _index_bytes(lengths: np.ndarray) -> bytes:
    """Returns an IndexedDataset index of int32 sequences of `lengths`, three to a document.

    Source: NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py, _IndexWriter.
    """
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(4 * lengths[:-1].astype(np.int64), out=pointers[1:])
    documents = np.arange(0, len(lengths) + 1, 3, dtype=np.int64)
    header = struct.pack("<9sQBQQ", INDEX_MAGIC, INDEX_VERSION, INT32_CODE, len(lengths), len(documents))
    return header + lengths.astype(np.int32).tobytes() + pointers.tobytes() + documents.tobytes()


def _parse_index(index: bytes) -> tuple[np.ndarray, np.ndarray]:
    start = struct.calcsize("<9sQBQQ")
    _, _, _, num_sequences, _ = struct.unpack("<9sQBQQ", index[:start])
    lengths = np.frombuffer(index, np.int32, num_sequences, start)
    pointers = np.frombuffer(index, np.int64, num_sequences, start + lengths.nbytes)
    return lengths, pointers


def _prompt_key(record: PreferenceRecord) -> int:
    prompt = record.prompt if not record.tools else (record.prompt, record.tools)
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


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
