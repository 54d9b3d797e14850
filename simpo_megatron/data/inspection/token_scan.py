"""Looks at every token of a dataset, some megabytes at a time: ends of texts, and pairs that are equal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simpo_megatron.data.dataset import PreferenceDataset, splitmix
from simpo_megatron.data.store import PairStore

_BLOCK_PAIRS = 1 << 14
_BLOCK_TOKENS = 1 << 18


def edges(dataset: PreferenceDataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first two ids of each prompt, and the last two of each response.

    int32 [num_pairs, 2] and [num_pairs, 2 responses, 2], `-1` where a text has one token. A token of context is there
    as its own id.
    """
    starts, ends = [], []
    for store in dataset.stores:
        first, last = np.full((len(store), 2), -1, np.int32), np.full((len(store), 2, 2), -1, np.int32)
        for begin, stop, tokens in _blocks(store):
            bounds = _bounds(store, begin, stop)
            tokens = np.maximum(tokens, ~tokens)
            for place in (0, 1):
                at, is_there = bounds[:, 0] + place, store.lengths[begin:stop, 0] > place
                first[begin:stop, place][is_there] = tokens[at[is_there]]
                at, is_there = bounds[:, 2:] - 2 + place, store.lengths[begin:stop, 1:] >= 2 - place
                last[begin:stop, :, place][is_there] = tokens[at[is_there]]
        starts.append(first)
        ends.append(last)
    return np.concatenate(starts)[dataset.chosen], np.concatenate(ends)[dataset.chosen]


def pair_hashes(dataset: PreferenceDataset) -> np.ndarray:
    """Returns a hash of each pair's ids, uint64 [num_pairs]: equal for equal pairs, else as good as never."""
    hashes = []
    for store in dataset.stores:
        found = np.zeros(len(store), np.uint64)
        for begin, stop, tokens in _blocks(store):
            bounds = _bounds(store, begin, stop)[:, :3]
            lengths = store.lengths[begin:stop].ravel()
            # Where each token stands in its text, and which of the pair's three texts that is.
            places = np.arange(len(tokens)) - np.repeat(bounds.ravel(), lengths)
            texts = np.repeat(np.tile(np.arange(3), stop - begin), lengths)
            mixed = splitmix((tokens.astype(np.uint64) << np.uint64(32)) ^ (places * 4 + texts).astype(np.uint64))
            found[begin:stop] = np.add.reduceat(mixed, bounds[:, 0])
        hashes.append(found)
    return np.concatenate(hashes)[dataset.chosen]


def _bounds(store: PairStore, begin: int, stop: int) -> np.ndarray:
    """Returns where the texts of pairs begin among their tokens, and where the last one ends: [num_pairs, 4]."""
    ends = np.cumsum(store.lengths[begin:stop].ravel(), dtype=np.int64)
    return np.column_stack((np.concatenate([[0], ends[:-1]]).reshape(-1, 3), ends[2::3]))


def _blocks(store: PairStore) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (first pair, behind the last pair, their tokens), read and not mapped, which would stay in memory."""
    ends = np.cumsum(store.lengths.sum(axis=1, dtype=np.int64))
    begin = offset = 0
    while begin < len(store):
        stop = int(np.searchsorted(ends, offset + _BLOCK_TOKENS, side="right"))
        stop = min(max(stop, begin + 1), begin + _BLOCK_PAIRS, len(store))
        count = int(ends[stop - 1]) - offset
        yield begin, stop, np.fromfile(store.folder / "pairs.bin", np.int32, count, offset=4 * offset)
        begin, offset = stop, offset + count
