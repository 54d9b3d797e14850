"""A preference dataset: the tokenised pairs of some files, the weight of each file, and a split."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.sources import Source, files_of, parse_sources
from simpo_megatron.data.store import BuildReport, PairStore, digest_of_tokenizer, open_store
from simpo_megatron.data.tokenization import TokenizedPair
from simpo_megatron.errors import DataError, listed, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_UINT64 = 1 << 64


class PreferenceDataset:
    """A choice of pairs out of some stores: `dataset[i]`, `len(dataset)`.

    lengths: int32 [num_pairs, 3], tokens of prompt, chosen and rejected.
    fingerprint: changes exactly when a token or the choice of pairs changes.
    report: counts of the files' records.
    counted: int32 [num_pairs, 2], |y|: the tokens of chosen and rejected that the assistant wrote.
    score_gaps: float32 [num_pairs], nan where the responses have no scores.
    stores, chosen: the stores that hold the pairs, and the numbers of the chosen pairs, counted through all stores.
    reference_avg: the argument of `with_reference`, if it was called.
    """

    def __init__(self, stores: Sequence[PairStore], chosen: np.ndarray | None = None) -> None:
        self.stores = tuple(stores)
        self._ends = np.cumsum([len(store) for store in stores])
        self.chosen = np.arange(self._ends[-1]) if chosen is None else chosen
        self.lengths = np.concatenate([store.lengths for store in stores])[self.chosen]
        self.counted = np.concatenate([store.counted for store in stores])[self.chosen]
        self.prompt_keys = np.concatenate([store.pairs["prompt_key"] for store in stores])[self.chosen]
        self.lost = np.concatenate([store.pairs["lost"] for store in stores])[self.chosen]
        self.score_gaps = np.concatenate([store.score_gaps for store in stores])[self.chosen]
        self.max_token_id = max(store.max_token_id for store in stores)
        self.report = BuildReport()
        for store in stores:
            self.report.add(store.report)
        digest = hashlib.sha256(self.chosen.astype(np.int64).tobytes())
        for store in stores:
            digest.update(store.fingerprint.encode())
        self.fingerprint = digest.hexdigest()
        self.reference_avg: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> TokenizedPair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        store, pair = self._locate(index)
        return store[pair]

    def where(self, index: int) -> tuple[str, int]:
        """Returns the store's name and the line (from 1) in its file from which pair `index` comes."""
        store, pair = self._locate(index)
        return store.name, int(store.pairs["line"][pair])

    def places(self, indices: Iterable[int], most: int) -> str:
        """Returns where the first `most` pairs of `indices` come from, as in `a:3, 9, b:1 and 4 more`."""
        found, last = [], None
        for index in indices:
            name, line = self.where(index)
            found.append(str(line) if name == last else f"{name}:{line}")
            last = name
        return listed(found, most)

    def shares(self) -> list[tuple[str, int, int]]:
        """Returns, for each store, its name, how many of its pairs are chosen, and how many it has."""
        counts = np.bincount(np.searchsorted(self._ends, self.chosen, side="right"), minlength=len(self.stores))
        return [(store.name, int(count), len(store)) for store, count in zip(self.stores, counts, strict=True)]

    def select(self, indices: np.ndarray) -> PreferenceDataset:
        """Returns a dataset of the pairs at `indices` of this one, in that order."""
        return PreferenceDataset(self.stores, self.chosen[indices])

    def with_reference(self, reference_avg: np.ndarray) -> PreferenceDataset:
        """Returns this dataset with the log-probs of a reference model, for objectives that need one.

        Args:
            reference_avg: float32 [num_pairs, 2], average log-probability of chosen and rejected, nats per token.
        """
        known = copy.copy(self)
        known.reference_avg = reference_avg
        return known

    def _locate(self, index: int) -> tuple[PairStore, int]:
        flat = int(self.chosen[index])
        number = int(np.searchsorted(self._ends, flat, side="right"))
        return self.stores[number], flat - (int(self._ends[number - 1]) if number else 0)


def build_preference_dataset(
    files: Sequence[str | float | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    options: PairOptions,
    cache_dir: str | Path,
    *,
    build: bool = True,
    num_workers: int = 0,
    tokenizer_digest: str = "",
) -> PreferenceDataset:
    """Returns the pairs of `files` (see `parse_sources`), tokenised once and kept under `cache_dir`.

    In a job of many ranks, one rank calls this first; the others call it afterwards with `build=False`. With weights,
    an epoch takes a share of each file and repeats no pair: the smallest file for its weight gives all its pairs, the
    others as many as the weights allow, chosen by hash.

    Args:
        tokenizer: None with `build=False`, where its digest is known.
        tokenizer_digest: that of `digest_of_tokenizer`, where it is known.

    Raises: ConfigError: wrong files or weights; DataError: an error in a file.
    """
    sources = parse_sources(files)
    if not tokenizer_digest:
        assert tokenizer is not None, "its digest is not known"
        tokenizer_digest = digest_of_tokenizer(tokenizer, options)
    groups = [
        [
            open_store(
                file,
                tokenizer,
                options,
                str(cache_dir),
                build=build,
                num_workers=num_workers,
                tokenizer_digest=tokenizer_digest,
            )
            for file in files_of(source.path)
        ]
        for source in sources
    ]
    stores = [store for group in groups for store in group]
    return PreferenceDataset(stores, _weighted_choice(sources, [sum(map(len, group)) for group in groups]))


def split(
    dataset: PreferenceDataset, valid_fraction: float, seed: int = 42
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Returns (train, validation): all pairs of a prompt fall on one side, by a hash of it and `seed` alone.

    The share is one of prompts, so that of pairs is approximate. A prompt stays on its side when other prompts are
    added or removed.

    Raises: ConfigError when the fraction is not between 0 and 1; DataError when a side would be empty.
    """
    require(0 < valid_fraction < 1, "valid_fraction", valid_fraction, "a fraction between 0 and 1")
    in_valid = mix(dataset.prompt_keys, seed) < np.uint64(int(valid_fraction * _UINT64))
    num_valid = int(in_valid.sum())
    if num_valid in (0, len(dataset)):
        raise DataError(
            f"valid_fraction: found {valid_fraction:g}, expected pairs on both sides: of {len(dataset)} it leaves "
            f"{num_valid} for validation and {len(dataset) - num_valid} to train on; change it, or set valid_data"
        )
    return dataset.select(np.flatnonzero(~in_valid)), dataset.select(np.flatnonzero(in_valid))


def check_vocabulary(dataset: PreferenceDataset, vocab_size: int) -> None:
    """Raises DataError when a token id is not below `vocab_size`, the model's true vocabulary size."""
    if dataset.max_token_id >= vocab_size:
        raise DataError(
            f"tokenizer: found the token id {dataset.max_token_id} in the pairs, expected ids below {vocab_size}, the "
            "model's vocabulary; the tokenizer belongs to another model"
        )


def mix(values: np.ndarray, seed: int) -> np.ndarray:
    """Returns a uniform uint64 hash of each value and `seed`, the same everywhere and always (splitmix64)."""
    mixed = values.astype(np.uint64) ^ np.uint64(splitmix(np.array([seed % _UINT64], np.uint64))[0])
    return splitmix(mixed)


def splitmix(x: np.ndarray) -> np.ndarray:
    """Returns the next number of each uint64 state of the generator splitmix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _weighted_choice(sources: Sequence[Source], num_pairs: Sequence[int]) -> np.ndarray | None:
    if sources[0].weight is None:
        return None
    weights = np.array([source.weight for source in sources])
    sizes = np.array(num_pairs)
    counts = np.floor(weights * (sizes / weights).min() + 1e-9).astype(int)
    starts = np.cumsum(sizes) - sizes
    chosen = []
    for number, (start, size, count) in enumerate(zip(starts, sizes, counts, strict=True)):
        order = np.argsort(mix(np.arange(size), number), kind="stable")
        chosen.append(start + np.sort(order[:count]))
    return np.concatenate(chosen)
