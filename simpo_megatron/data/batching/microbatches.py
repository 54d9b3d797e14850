"""The tensors of one microbatch.

Legend: S tokens of a row, B rows, N response tokens, P pairs of a microbatch, G segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simpo_megatron.data.batch_options import BatchOptions
from simpo_megatron.data.tokenization import TokenizedPair


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


def round_up(count: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is not below `count`."""
    return -(-int(count) // multiple) * multiple
