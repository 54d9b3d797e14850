"""Selecting response rows from hidden states, whole or sharded over the sequence, and sending gradients back.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, H hidden, N selected rows of the
whole sequence, M those this rank holds (N where the hidden states are replicated), T tp ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RowSelection:
    """The selected rows of this rank's hidden states, and the number of them on every rank.

    own_M: int64, flat indices into the first two dimensions of this rank's hidden states.
    counts: M of every rank under sequence parallelism; None where the hidden states are replicated.
    group: the ranks to exchange with; None for one rank.
    """

    own_M: Tensor
    counts: tuple[int, ...] | None
    group: ProcessGroup | None

    @classmethod
    def of(
        cls,
        rows_N: Tensor,
        num_local: int,
        *,
        group: ProcessGroup | None,
        sharded: bool,
        copy_N: Tensor | None = None,
    ) -> RowSelection:
        """Returns the selection of ascending rows of the whole sequence, `num_local` of them on each rank.

        Args:
            rows_N: int64, ascending, replicated over the group.
            num_local: rows (S * B) of this rank's hidden states.
            group: the tensor-parallel ranks; None or one rank exchanges nothing.
            sharded: whether the hidden states are sharded over the sequence.
            copy_N: `rows_N` on the device of the hidden states; None: it is there.
        """
        copy_N = rows_N if copy_N is None else copy_N
        if group is None or group.size() == 1:
            return cls(copy_N, None, None)
        if not sharded:
            return cls(copy_N, None, group)
        bounds = torch.arange(group.size() + 1, device=rows_N.device) * num_local
        cuts = torch.searchsorted(rows_N, bounds).tolist()
        rank = group.rank()
        own_M = copy_N[cuts[rank] : cuts[rank + 1]] - rank * num_local
        counts = tuple(stop - start for start, stop in pairwise(cuts))
        return cls(own_M, counts, group)

    def gather(self, hidden_SBH: Tensor) -> Tensor:
        """Returns the selected rows of the whole sequence, [N, H], on every rank.

        Collectives: under sequence parallelism one all-to-all over the group in which each rank receives
        [N, H]: an all-gather whose parts differ in length, which neither gloo nor NCCL offers as one call.
        """
        own_MH = hidden_SBH.flatten(0, 1).index_select(0, self.own_M)
        if self.counts is None:
            return own_MH
        num_ranks = len(self.counts)
        rows_NH = own_MH.new_empty(sum(self.counts), own_MH.shape[1])
        dist.all_to_all_single(
            rows_NH,
            own_MH.repeat(num_ranks, 1),
            output_split_sizes=list(self.counts),
            input_split_sizes=[own_MH.shape[0]] * num_ranks,
            group=self.group,
        )
        return rows_NH

    def start_reduce(self, grad_NH: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Starts summing every rank's gradient of the selected rows; `finish_reduce` takes what it returns.

        Args:
            grad_NH: contiguous; overwritten.

        Collectives: one over the group, of [N, H]: an all-reduce, or under sequence parallelism an all-to-all
        that hands each rank T versions of its own rows, to be added there in fp32.
        """
        if self.group is None:
            return grad_NH, None
        if self.counts is None:
            return grad_NH, dist.all_reduce(grad_NH, group=self.group, async_op=True)
        num_ranks, num_own = len(self.counts), self.counts[self.group.rank()]
        parts_TMH = grad_NH.new_empty(num_ranks, num_own, grad_NH.shape[1])
        work = dist.all_to_all_single(
            parts_TMH.flatten(0, 1),
            grad_NH,
            output_split_sizes=[num_own] * num_ranks,
            input_split_sizes=list(self.counts),
            group=self.group,
            async_op=True,
        )
        return parts_TMH, work

    def finish_reduce(self, pending: tuple[Tensor, dist.Work | None], shape_SBH: torch.Size) -> Tensor:
        """Returns the gradient of this rank's hidden states, zero at every row that was not selected."""
        grad, work = pending
        if work is not None:
            work.wait()
        if grad.dim() == 3:
            grad = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
        grad_SBH = grad.new_zeros(shape_SBH)
        grad_SBH.flatten(0, 1).index_add_(0, self.own_M, grad)
        return grad_SBH
