"""Chunks of consecutive records: reads and tokenises them in one process or several, and reports on each record."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import BadRecord, PreferenceRecord, check_row, parse_json, to_record
from simpo_megatron.data.rendering import FINDINGS
from simpo_megatron.data.sources import RawRecord, read_raw, source_identity
from simpo_megatron.data.store.build_report import BuildReport
from simpo_megatron.data.store.workers import map_in_processes
from simpo_megatron.data.tokenization import PARTS, PairTokenizer, leave_out_torch, use_one_thread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


@dataclass
class Chunk:
    """The pairs of some consecutive records."""

    tokens: np.ndarray
    """int32: prompt, chosen and rejected of each pair in turn, as `TokenizedPair.marked` has them."""
    lengths: np.ndarray
    """int32 [num_pairs, 3]."""
    pairs: np.ndarray
    """[num_pairs] of PAIR_DTYPE."""
    report: BuildReport
    num_bytes: int = 0
    """Bytes of the records in a file of lines, else 0."""


def encode_chunk(raw: list[RawRecord], path: str, pair_tokenizer: PairTokenizer, options: PairOptions) -> Chunk:
    """Returns the tokens of some consecutive raw records, and the report on them."""
    report, lines, records, bad = _parsed(raw, path, options)
    tokens = array("i")
    lengths, rows = [], []
    for line, record, encoded in zip(lines, records, pair_tokenizer.encode(records), strict=True):
        if isinstance(encoded, BadRecord):
            bad[line] = encoded
            continue
        of_pair = array("i", chain(*encoded.ids))
        tokens.extend(of_pair)
        lengths.append([len(ids) for ids in encoded.ids])
        counted = [len(ids) if min(ids) >= 0 else sum(i >= 0 for i in ids) for ids in encoded.ids[1:]]
        rows.append((line, _prompt_key(record), encoded.lost, record.reading.score_gap, counted, crc32(of_pair)))
        for note in encoded.notes:
            report.notes[note] += 1
            report.first.setdefault(note, f"{path}:{line}: {note}: {FINDINGS.get(note, note)}")
        if any(encoded.lost):
            report.notes.update(f"with a cut {name}" for name, lost in zip(PARTS, encoded.lost, strict=True) if lost)
    report.num_used = len(rows)
    _note_dropped(report, bad, path)
    num_bytes = sum(len(item.row) for item in raw if isinstance(item.row, bytes))
    return Chunk(
        np.array(tokens, np.int32), np.array(lengths, np.int32).reshape(-1, 3), _pairs(rows), report, num_bytes
    )


def report_on_records(raw: list[RawRecord], path: str, options: PairOptions) -> BuildReport:
    """Returns the report on some raw records as far as it is known before they are tokenised."""
    report, _, _, bad = _parsed(raw, path, options)
    _note_dropped(report, bad, path)
    return report


def _parsed(
    raw: list[RawRecord], path: str, options: PairOptions
) -> tuple[BuildReport, list[int], list[PreferenceRecord], dict[int, BadRecord]]:
    """Returns (the report without what is dropped, lines and records of pairs, the problem of each other line)."""
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
    return report, lines, records, bad


def _note_dropped(report: BuildReport, bad: dict[int, BadRecord], path: str) -> None:
    for line, problem in sorted(bad.items()):
        report.dropped[problem.reason] += 1
        report.first.setdefault(problem.reason, f"{path}:{line}: {problem.reason}: {problem.detail}")


def _pairs(rows: list[tuple]) -> np.ndarray:
    """Returns the rows as PAIR_DTYPE, column by column, which is several times as fast."""
    pairs = np.empty(len(rows), PAIR_DTYPE)
    for name, column in zip(PAIR_DTYPE.names or (), zip(*rows, strict=True), strict=False):
        pairs[name] = np.array(column, PAIR_DTYPE[name].base)
    return pairs


def encoded_chunks(
    path: str, tokenizer: PreTrainedTokenizerBase, options: PairOptions, num_workers: int, *, skip: int = 0
) -> Iterator[Chunk]:
    """Yields the chunks of a source in order, without the first `skip`, by `num_workers` processes.

    0 takes a process for every 16 MiB, up to the number of cores.
    """
    chunks = islice(_chunked(read_raw(path, options)), skip, None)
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
        # As bytes: what it takes is imported where they are read.
        arguments=(pickle.dumps(tokenizer), path, options),
        describe=partial(_lines, path),
    )


# In a worker process: the file, and the function that tokenises its records.
_worker: tuple[str, PairTokenizer, PairOptions]


def _start_worker(tokenizer: bytes, path: str, options: PairOptions) -> None:
    global _worker
    use_one_thread()
    leave_out_torch()
    _worker = (path, PairTokenizer(pickle.loads(tokenizer), options), options)  # noqa: S301 - of the parent


def _work(chunk: list[RawRecord]) -> Chunk:
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


# Made once, for an encoder takes as long as a short prompt.
_PROMPTS = json.JSONEncoder(default=str)


def _prompt_key(record: PreferenceRecord) -> int:
    prompt = record.prompt if not record.tools else (record.prompt, record.tools)
    text = prompt if isinstance(prompt, str) else _PROMPTS.encode(prompt)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
