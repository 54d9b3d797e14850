"""Ranks that start on one machine share what they read: model and store are mapped or looked up, and not copied whole.

`rchar` of /proc/self/io counts every byte that this process has asked of read calls. A mapped file adds none: its pages
are those of the system's page cache, which all ranks of a machine share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_stores import OPTIONS, build, folders, write_pairs
from data_tokenizers import llama_like
from qwen2_twin import random_weights, stand_in, twin_parameters, write_folder

from simpo_megatron.convert import load_hf_weights
from simpo_megatron.data.store import PairStore, open_store

IO = Path("/proc/self/io")
pytestmark = pytest.mark.skipif(not IO.exists(), reason="needs Linux's /proc/self/io")


def bytes_read(work: Callable[[], Any]) -> tuple[Any, int]:
    """(What `work` returns, the bytes that this process read meanwhile, but for what is read here.)"""

    def total() -> int:
        return int(IO.read_text().split()[1])

    before = total()
    nothing = total() - before
    result = work()
    return result, total() - before - 2 * nothing


def test_a_rank_maps_the_weights_and_copies_its_own_share_alone(tmp_path):
    weights = random_weights()
    description = write_folder(tmp_path, weights)
    (file,) = tmp_path.glob("*.safetensors")
    for rank in (0, 1):
        chunk = stand_in(twin_parameters(weights, rank, 2, te=False))
        load_hf_weights([chunk], tmp_path, description, tp_rank=rank, tp_size=2)  # imports are read once
        _, count = bytes_read(
            lambda rank=rank, chunk=chunk: load_hf_weights([chunk], tmp_path, description, tp_rank=rank, tp_size=2)
        )
        headers = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert count < 8 * headers + (tmp_path / "config.json").stat().st_size, f"of {file.stat().st_size} bytes"


def test_a_rank_that_opens_what_another_built_reads_no_token_but_those_of_its_pairs(tmp_path):
    file = write_pairs(tmp_path / "pairs.jsonl", 2000)
    built = build(file, tmp_path, num_workers=1)
    (folder,) = folders(tmp_path)
    tokens = (folder / "pairs.bin").stat().st_size
    tokenizer, known = llama_like(), digest(folder)

    def later() -> PairStore:
        cache = str(tmp_path / "cache")
        return open_store(str(file), tokenizer, OPTIONS, cache, build=False, tokenizer_digest=known)

    later()
    store, count = bytes_read(later)
    index = sum((folder / name).stat().st_size for name in ("pairs.idx", "store.json"))
    assert count < index + (16 << 10) < tokens / 2, f"{count} bytes, where the tokens are {tokens}"
    assert not store.pairs.flags.owndata, "rows of pairs are mapped"
    _, count = bytes_read(lambda: [store[number] for number in (0, 7, 1999)])
    assert count == 4 * int(store.lengths[[0, 7, 1999]].sum())
    assert len(built) == len(store)


def digest(folder: Path) -> str:
    """The digest of the tokenizer that a store was built with."""
    return json.loads((folder / "store.json").read_text())["identity"]["tokenizer"]


def test_only_the_rank_that_builds_looks_at_every_byte_of_a_store(tmp_path):
    build(write_pairs(tmp_path / "pairs.jsonl", 2000), tmp_path, num_workers=1)
    (folder,) = folders(tmp_path)
    _, verified = bytes_read(lambda: PairStore(folder))
    _, trusted = bytes_read(lambda: PairStore(folder, verify=False))
    assert verified - trusted >= (folder / "pairs.bin").stat().st_size
