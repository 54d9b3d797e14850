"""The pairs of each step, rank and microbatch.

The plan is a pure function of the pairs' lengths, the options, the number of pairs consumed and the number of ranks.
Every rank computes it alone, and all get the same. The order of pairs depends only on the seed, the epoch and the
pairs consumed.
"""

import heapq
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from simpo_megatron.data.batch_options import BatchOptions, check_global_batch_size
from simpo_megatron.data.batching.microbatches import PreferenceBatch, collate, round_up
from simpo_megatron.data.dataset import PreferenceDataset, mix
from simpo_megatron.errors import ConfigError, require

MicrobatchPairs = tuple[int, ...]
"""Dataset indices of the pairs of one microbatch."""
StepPlan = tuple[tuple[MicrobatchPairs, ...], ...]
"""`plan[dp_rank][microbatch]`; every rank has the same number of microbatches."""


def pair_tokens(lengths: np.ndarray, options: BatchOptions) -> np.ndarray:
    """Returns the tokens of each pair in a packed row, int64 [num_pairs], from lengths [num_pairs, 3]."""
    copies_of_prompt = 1 if options.prefix_sharing else 2
    return lengths.astype(np.int64) @ np.array([copies_of_prompt, 1, 1])


def check_batches(lengths: np.ndarray, options: BatchOptions, *, dp_size: int, microbatch_multiple: int = 1) -> None:
    """Raises ConfigError, with the arithmetic, when some step could not be planned from such pairs."""
    num_pairs, batch = len(lengths), options.global_batch_size
    require(num_pairs >= batch, "global_batch_size", batch, f"at most {num_pairs}, the pairs of the data; lower it")
    check_global_batch_size(batch, dp_size=dp_size, microbatch_multiple=microbatch_multiple)
    check_budget(lengths, options)


def check_budget(lengths: np.ndarray, options: BatchOptions) -> None:
    """Raises ConfigError when a pair alone is longer than a packed microbatch may be."""
    tokens = pair_tokens(lengths, options)
    if options.packing and tokens.max() > options.tokens_per_microbatch:
        longest = int(tokens.argmax())
        needed = round_up(tokens[longest], options.sequence_multiple)
        raise ConfigError(
            f"tokens_per_microbatch: found {options.tokens_per_microbatch}, expected at least {needed}: pair {longest} "
            f"takes {tokens[longest]} tokens; raise it to {needed}, or lower max_length"
        )


def step_pairs(num_pairs: int, consumed_pairs: int, options: BatchOptions) -> np.ndarray:
    """Returns the indices, int64 [global_batch_size], of the pairs after the first `consumed_pairs` ones.

    Each epoch is its own permutation of all pairs; a step at an epoch's end takes the missing pairs from the next.
    """
    end = consumed_pairs + options.global_batch_size
    parts = []
    while consumed_pairs < end:
        epoch, start = divmod(consumed_pairs, num_pairs)
        parts.append(_epoch_order(num_pairs, epoch, options.seed)[start : start + end - consumed_pairs])
        consumed_pairs += len(parts[-1])
    return np.concatenate(parts)


def plan_step(
    lengths: np.ndarray,
    consumed_pairs: int,
    options: BatchOptions,
    *,
    dp_size: int,
    microbatch_multiple: int = 1,
) -> StepPlan:
    """Returns `plan[dp_rank][microbatch]`: the dataset indices of the pairs of the next step.

    Every rank gets the same number of microbatches, a multiple of `microbatch_multiple`; together they hold
    exactly `global_batch_size` pairs. A microbatch is empty only where there are more microbatches than
    pairs.
    """
    indices = step_pairs(len(lengths), consumed_pairs, options)
    return _plan(lengths, indices, options, dp_size * microbatch_multiple, dp_size)


def plan_evaluation(
    lengths: np.ndarray, options: BatchOptions, *, dp_size: int, microbatch_multiple: int = 1
) -> list[StepPlan]:
    """Returns plans as `plan_step` does, for every pair once, in order, `global_batch_size` to a plan."""
    starts = range(0, len(lengths), options.global_batch_size)
    every = np.arange(len(lengths))
    return [
        _plan(
            lengths,
            every[start : start + options.global_batch_size],
            options,
            dp_size * microbatch_multiple,
            dp_size,
        )
        for start in starts
    ]


def iterate_steps(
    dataset: PreferenceDataset,
    options: BatchOptions,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    consumed_pairs: int = 0,
) -> Iterator[list[PreferenceBatch]]:
    """Yields, without end, one rank's microbatches of each step; all ranks' together are the global batch."""
    check_batches(dataset.lengths, options, dp_size=dp_size)
    while True:
        plan = plan_step(dataset.lengths, consumed_pairs, options, dp_size=dp_size)
        yield [collate([dataset[i] for i in microbatch], microbatch, options) for microbatch in plan[dp_rank]]
        consumed_pairs += options.global_batch_size


@lru_cache(maxsize=2)
def _epoch_order(num_pairs: int, epoch: int, seed: int) -> np.ndarray:
    keys = mix(mix(np.arange(num_pairs), seed), epoch)
    return np.argsort(keys, kind="stable")


def _plan(lengths: np.ndarray, indices: np.ndarray, options: BatchOptions, num_multiple: int, dp_size: int) -> StepPlan:
    fill = _fill_by_tokens if options.packing else _fill_by_count
    microbatches = fill(lengths[indices], options, num_multiple)
    ids = [tuple(int(indices[i]) for i in microbatch) for microbatch in microbatches]
    num_each = len(ids) // dp_size
    # Heaviest first and ranks in turn, so that microbatch k weighs about the same on every rank.
    return tuple(tuple(ids[k * dp_size + rank] for k in range(num_each)) for rank in range(dp_size))


def _fill_by_tokens(lengths: np.ndarray, options: BatchOptions, num_multiple: int) -> list[list[int]]:
    """Returns balanced packs, heaviest first: the next longest pair goes to the lightest pack."""
    tokens = pair_tokens(lengths, options)
    budget = options.tokens_per_microbatch
    num_packs = round_up(-(-int(tokens.sum()) // budget), num_multiple)
    longest_first = np.argsort(-tokens, kind="stable")
    while True:
        packs: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(num_packs)]
        for index in longest_first:
            size, number, pack = packs[0]
            pack.append(int(index))
            heapq.heapreplace(packs, (size + int(tokens[index]), number, pack))
        if max(size for size, _, _ in packs) <= budget or num_packs >= len(tokens):
            if options.one_shape_per_step:
                packs = _evened(packs, tokens)
            return [pack for _, _, pack in sorted(packs, key=lambda entry: (-entry[0], entry[1]))]
        num_packs += num_multiple


def _evened(packs: list[tuple[int, int, list[int]]], tokens: np.ndarray) -> list[tuple[int, int, list[int]]]:
    """Returns `packs` with the heaviest one lighter, for all are padded to it.

    Repeatedly exchanges a pair for a shorter one of another pack, choosing the exchange that makes the heavier of the
    two packs lightest. Stops when no exchange helps or padding is within a percent.
    """
    of_pair = np.empty(len(tokens), np.int64)
    for number, (_, _, pack) in enumerate(packs):
        of_pair[pack] = number
    sizes = np.array([size for size, _, _ in packs])
    while sizes.max() > 1.01 * sizes.mean():
        heaviest = int(sizes.argmax())
        own, others = (np.flatnonzero(mine) for mine in (of_pair == heaviest, of_pair != heaviest))
        moved = tokens[own][:, None] - tokens[others]
        left, grown = sizes[heaviest] - moved, sizes[of_pair[others]] + moved
        heavier = np.maximum(left, grown)
        if not heavier.size or heavier.min() >= sizes[heaviest]:
            break
        one, other = np.unravel_index(heavier.argmin(), heavier.shape)
        given, taken, receiver = own[one], others[other], of_pair[others[other]]
        sizes[heaviest], sizes[receiver] = left[one, other], grown[one, other]
        of_pair[given], of_pair[taken] = receiver, heaviest
    # Those of a pack, longest first, as they were put in.
    longest_first = np.argsort(-tokens, kind="stable")
    members = [longest_first[of_pair[longest_first] == number].tolist() for number in range(len(packs))]
    return [(int(sizes[n]), number, members[n]) for n, (_, number, _) in enumerate(packs)]


def _fill_by_count(lengths: np.ndarray, options: BatchOptions, num_multiple: int) -> list[list[int]]:
    """Returns groups of at most `micro_batch_size` pairs of like length, longest first."""
    longest_first = np.argsort(-(lengths[:, 0] + lengths[:, 1:].max(axis=1)), kind="stable")
    num_groups = round_up(-(-len(lengths) // options.micro_batch_size), num_multiple)
    return [group.tolist() for group in np.array_split(longest_first, num_groups)]
