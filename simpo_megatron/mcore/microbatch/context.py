"""Context parallelism: which rows of a microbatch a rank holds, and how it sees the others' keys and values.

Shapes: S rows of the whole microbatch, s those of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ContextShare:
    """This rank's rows: an early and a late one of 2 * cp equal pieces, which makes causal attention cost the same.

    Transformer Engine's context parallelism expects this division, for one long row or several.
    """

    group: ProcessGroup
    num_rows: int
    """S; a multiple of 2 * cp."""

    @property
    def pieces(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """`(start, stop)` of this rank's two pieces."""
        early, late = self._pieces_of(self.group.rank())
        return early, late

    def rows(self) -> Tensor:
        """int64 [s], ascending: the rows of this rank's pieces."""
        return self._rows_of(self.group.rank())

    def places(self) -> Tensor:
        """int64 [S]: where each row lies in what `gather` returns."""
        return torch.cat([self._rows_of(rank) for rank in range(self.group.size())]).argsort()

    def gather(self, own_s: Tensor) -> Tensor:
        """The rows of all ranks, [S, ...], those of one rank after the other, from this rank's [s, ...].

        Readers index them through `places`, which saves a pass that would sort them.

        Collectives: one all-gather over cp; in the backward one reduce-scatter, which sums the gradients of a key over
        the ranks' queries.
        """
        return _Gather.apply(own_s, self.group)

    def _rows_of(self, rank: int) -> Tensor:
        return torch.cat([torch.arange(start, stop) for start, stop in self._pieces_of(rank)])

    def _pieces_of(self, rank: int) -> list[tuple[int, int]]:
        num_pieces = 2 * self.group.size()
        size = self.num_rows // num_pieces
        return [(index * size, (index + 1) * size) for index in (rank, num_pieces - 1 - rank)]


class _Gather(torch.autograd.Function):
    """All ranks' rows; in the backward, the sum over ranks of the gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, own_s: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        by_rank = own_s.new_empty(group.size() * len(own_s), *own_s.shape[1:])
        dist.all_gather_into_tensor(by_rank, own_s.contiguous(), group=group)
        return by_rank

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None]:
        own_s = grad_S.new_empty(len(grad_S) // ctx.group.size(), *grad_S.shape[1:])
        dist.reduce_scatter_tensor(own_s, grad_S.contiguous(), group=ctx.group)
        return own_s, None
