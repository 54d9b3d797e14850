"""The pairs of each step, rank and microbatch, and the tensors of one microbatch.

The plan is a pure function of the pairs' lengths, the options, the number of pairs consumed and the number of ranks.
Every rank computes it alone, and all get the same. The order of pairs depends only on the seed, the epoch and the
pairs consumed.

Legend: S tokens of a row, B rows, N response tokens, P pairs of a microbatch, G segments.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from simpo_megatron.data.batch_options import BatchOptions, check_global_batch_size
from simpo_megatron.data.dataset import PreferenceDataset, mix
from simpo_megatron.data.tokenization import TokenizedPair
from simpo_megatron.errors import ConfigError, require

MicrobatchPairs = tuple[int, ...]
"""Dataset indices of the pairs of one microbatch."""
StepPlan = tuple[tuple[MicrobatchPairs, ...], ...]
"""`plan[dp_rank][microbatch]`; every rank has the same number of microbatches."""


@dataclass(frozen=True)
class PreferenceBatch:
    """One microbatch; torch tensors on the CPU.

    Response token n is predicted from row `rows_N[n]`, a flat index s * B + b into hidden states [S, B, H].
    Tokens of a response that the assistant did not write, such as tool results, are attended to but not predicted.
    Rows ascend and may repeat: with prefix sharing a prompt's last token predicts the first token of both
    responses.
    """

    tokens_BS: Tensor
    """int64 [B, S]: token ids."""
    position_ids_BS: Tensor
    """int64 [B, S]: each token's position in its own sequence; 0 for padding."""
    rows_N: Tensor
    """int64 [N]: ascending flat rows."""
    targets_N: Tensor
    """int64 [N]: the token ids to predict at these rows."""
    sequence_N: Tensor
    """int64 [N]: 2p for the chosen and 2p + 1 for the rejected response of the microbatch's pair p."""
    pair_ids_P: Tensor
    """int64 [P]: indices into the dataset."""
    segments_G4: Tensor | None
    """None: plain causal rows. Otherwise B == 1 and int32 [G, 4] of (q_start, q_end, prefix_start,
    prefix_end), which tile [0, S): the queries of a segment see causally, bottom-right, the keys of its
    prefix and then its own."""
    row_lengths_B: Tensor
    """int64 [B]: the real tokens of each row; the rest of it is padding."""

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding apart."""
        return int(self.row_lengths_B.sum())

    @property
    def padding_BS(self) -> Tensor | None:
        """bool [B, S], True for padding; None where there is none."""
        width = self.tokens_BS.shape[1]
        padding_BS = torch.arange(width) >= self.row_lengths_B[:, None]
        return padding_BS if padding_BS.any() else None

    @property
    def num_pairs(self) -> int:
        """Number of pairs P; 0 in a microbatch that only keeps a rank in step with the others."""
        return len(self.pair_ids_P)


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


def collate(
    pairs: Sequence[TokenizedPair],
    pair_ids: Sequence[int],
    options: BatchOptions,
    shape: tuple[int, int] | None = None,
) -> PreferenceBatch:
    """Returns the microbatch of `pairs`, whose dataset indices are `pair_ids`.

    Without packing and sharing each response is a row (chosen, rejected, chosen, ...), padded on the right to
    the longest; otherwise all stand in one row and `segments_G4` says who sees whom. No pair at all gives
    padding alone.

    Args:
        shape: (rows, tokens of a row) to fill with padding, that of `step_shape`; the smallest one when not given.
    """
    padded = (bool(pairs) or shape is not None) and not options.packing and not options.prefix_sharing
    return (_padded_rows if padded else _one_row)(pairs, pair_ids, options, shape)


def _padded_rows(
    pairs: Sequence[TokenizedPair],
    pair_ids: Sequence[int],
    options: BatchOptions,
    shape: tuple[int, int] | None,
) -> PreferenceBatch:
    sequences = [(p.prompt_ids, *response) for p in pairs for response in p.responses]
    lengths = [len(prompt) + len(response) for prompt, response, _ in sequences]
    num_rows, width = shape or (len(sequences), round_up(max(lengths), options.sequence_multiple))
    # The rows that fill up the shape hold only padding.
    sizes = np.array(lengths + [0] * (num_rows - len(sequences)))
    tokens = np.full((num_rows, width), options.pad_id, np.int64)
    position_ids = np.where(np.arange(width) < sizes[:, None], np.arange(width), 0)
    rows, targets = [], []
    for row, (prompt, response, mask) in enumerate(sequences):
        tokens[row, : sizes[row]] = np.concatenate([prompt, response])
        predicting = np.arange(len(prompt) - 1, sizes[row] - 1) * num_rows + row
        rows.append(_counted(predicting, mask))
        targets.append(_counted(response, mask))
    return _batch(tokens, position_ids, (rows, targets), pair_ids, None, sizes)


def _one_row(
    pairs: Sequence[TokenizedPair],
    pair_ids: Sequence[int],
    options: BatchOptions,
    shape: tuple[int, int] | None,
) -> PreferenceBatch:
    tokens, position_ids, rows, targets, segments = [], [], [], [], []
    end = 0

    def append(ids: np.ndarray, first_position: int) -> int:
        nonlocal end
        tokens.append(ids)
        position_ids.append(np.arange(first_position, first_position + len(ids)))
        end += len(ids)
        return end - len(ids)

    for pair in pairs:
        num_prompt = len(pair.prompt_ids)
        prompt_start = start = append(pair.prompt_ids, 0)
        for number, (response, mask) in enumerate(pair.responses):
            prefix = (0, 0)
            if number and options.prefix_sharing:
                start, prefix = end, (prompt_start, prompt_start + num_prompt)
            elif number:
                prompt_start = start = append(pair.prompt_ids, 0)
            first = append(response, num_prompt)
            rows.append(_counted(np.r_[prompt_start + num_prompt - 1, first : end - 1], mask))
            targets.append(_counted(response, mask))
            segments.append((start, end, *prefix))
    width = round_up(max(end, 1), options.sequence_multiple) if shape is None else shape[1]
    if end < width:
        segments.append((end, width, 0, 0))
        tokens.append(np.full(width - end, options.pad_id))
        position_ids.append(np.zeros(width - end, np.int64))
    tokens_1S, position_ids_1S = (np.concatenate(parts)[None].astype(np.int64) for parts in (tokens, position_ids))
    return _batch(tokens_1S, position_ids_1S, (rows, targets), pair_ids, segments, np.array([end]))


def _counted(of_response: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return of_response if mask is None else of_response[mask]


def _batch(
    tokens: np.ndarray,
    position_ids: np.ndarray,
    responses: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    pair_ids: Sequence[int],
    segments: Sequence[tuple[int, int, int, int]] | None,
    row_lengths: np.ndarray,
) -> PreferenceBatch:
    rows, targets = responses
    sequence = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    rows_N = np.concatenate([np.empty(0, np.int64), *rows])
    order = np.argsort(rows_N, kind="stable")
    targets_N = np.concatenate([np.empty(0, np.int64), *targets])
    return PreferenceBatch(
        tokens_BS=torch.from_numpy(tokens),
        position_ids_BS=torch.from_numpy(position_ids),
        rows_N=torch.from_numpy(rows_N[order]),
        targets_N=torch.from_numpy(targets_N[order]),
        sequence_N=torch.from_numpy(sequence[order].astype(np.int64)),
        pair_ids_P=torch.tensor(pair_ids, dtype=torch.int64),
        segments_G4=None if segments is None else torch.tensor(segments, dtype=torch.int32),
        row_lengths_B=torch.from_numpy(row_lengths),
    )


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


def round_up(count: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is not below `count`."""
    return -(-int(count) // multiple) * multiple
