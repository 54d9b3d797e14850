"""The two inputs of the loss besides tensors: which tokens count, and which vocabulary slice this rank holds.

Shapes: S sequence, B batch, R rows of a batch (two per pair), P pairs, H hidden, N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from simpo_megatron.errors import ConfigError, DataError

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """The slice of the vocabulary a rank holds: its weight's row `i` belongs to token id `start + i`.

    Ids from `size` on are padding that makes the vocabulary divisible by tp; no softmax sees them.
    """

    start: int
    size: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.size < 1:
            raise ConfigError(
                f"VocabShard: found start {self.start} and size {self.size}, expected start >= 0 and size > 0, the "
                "true vocabulary size before padding"
            )

    def num_real(self, width: int) -> int:
        """The number of this slice's `width` columns that are real token ids; they are the first ones."""
        return min(max(self.size - self.start, 0), width)


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a microbatch, each with its hidden row; the same on every tensor-parallel rank.

    A data loader hands them out on the CPU, where checking them costs no device synchronisation. With a copy on
    the device, the loss copies nothing. Tensors that lie on a GPU work too: each call then waits for them once.

    rows_N: int64, ascending, may repeat (a shared prompt's last row predicts the first token of both
        responses): flat indices into the first two dimensions of the hidden states of the whole sequence,
        `s * B + b` for Megatron's [S, B, H].
    targets_N: int64, the token id predicted at each row.
    sequence_N: int64 in [0, 2P): 2p for the chosen and 2p + 1 for the rejected response of pair p.
    num_pairs: P, the pairs of this microbatch.
    """

    rows_N: Tensor
    targets_N: Tensor
    sequence_N: Tensor
    num_pairs: int
    copy: ResponseTokens | None = field(default=None, repr=False, compare=False)
    """The same tokens on the device that computes."""

    def on(self, device: torch.device) -> ResponseTokens:
        """Returns the tokens on `device`: these, their copy, or a new copy, which costs one transfer."""
        for tokens in (self, self.copy):
            if tokens is not None and tokens.rows_N.device == device:
                return tokens
        rows_N, targets_N, sequence_N = torch.stack((self.rows_N, self.targets_N, self.sequence_N)).to(device)
        return replace(self, rows_N=rows_N, targets_N=targets_N, sequence_N=sequence_N, copy=self)

    def with_copy(self, rows_N: Tensor, targets_N: Tensor, sequence_N: Tensor) -> ResponseTokens:
        """Returns the tokens with these copies of their tensors, on another device."""
        return replace(self, copy=ResponseTokens(rows_N, targets_N, sequence_N, self.num_pairs))

    @classmethod
    def from_labels(cls, labels_RS: Tensor, ignore_index: int = IGNORE_INDEX) -> ResponseTokens:
        """Returns the tokens of padded rows c0 r0 c1 r1 ..., flat indices into hidden states [R, S, H].

        Args:
            labels_RS: int64. The label at t is the token predicted at t (nothing is shifted here);
                `ignore_index` at prompt and padding.

        Raises:
            ConfigError: the number of rows is odd.
        """
        num_rows, length = labels_RS.shape
        if num_rows % 2:
            raise ConfigError(f"labels: found {num_rows} rows, expected two per pair, chosen and rejected in turn")
        row_N, position_N = (labels_RS != ignore_index).nonzero(as_tuple=True)
        return cls(
            rows_N=row_N * length + position_N,
            targets_N=labels_RS[row_N, position_N],
            sequence_N=row_N,
            num_pairs=num_rows // 2,
        )

    def of_rows(self, rows: Tensor, num_rows: int, batch_size: int) -> ResponseTokens:
        """Returns the tokens that some rows of the sequence predict, flat indices into these rows alone.

        Args:
            rows: int64, ascending: the rows of [num_rows, batch_size, H] that a context-parallel rank holds.
            num_rows: the rows of the whole sequence.
            batch_size: B.
        """
        place = torch.full((num_rows,), -1)
        place[rows] = torch.arange(len(rows))
        place_N = place[self.rows_N // batch_size]
        own = place_N >= 0
        return ResponseTokens(
            rows_N=(place_N * batch_size + self.rows_N % batch_size)[own],
            targets_N=self.targets_N[own],
            sequence_N=self.sequence_N[own],
            num_pairs=self.num_pairs,
        )


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raises DataError when a target is not in [0, vocab_size): on every tp rank, since all see the same."""
    outside = (targets < 0) | (targets >= vocab_size)
    if outside.any():
        first = int(outside.flatten().nonzero()[0, 0])
        raise DataError(
            f"response token {first}: found id {int(targets.flatten()[first])}, expected one of a vocabulary of "
            f"{vocab_size} ids; check that the tokenizer belongs to the model"
        )
