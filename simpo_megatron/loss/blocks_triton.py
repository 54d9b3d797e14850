"""The head's log-probabilities on a GPU: three products of cuBLAS and two passes of Triton over the logits.

Forward: logits = rows @ W^T, over the whole slice or a few blocks of a multiple of 256 columns. One read of them gives
the log-sum-exp and the target's logit. Backward: one read and one write turn the logits into their gradient, which the
two gradient GEMMs take. There is no copy in fp32, and no gather or scatter of rows of the weight.

Shapes: S sequence, B batch, H hidden, v this rank's vocabulary slice, b one block of it, N response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.loss.block_plan import BlockPlan, round_up
from simpo_megatron.loss.head import HeadCall
from simpo_megatron.loss.log_probs import merge_shards
from simpo_megatron.loss.main_grad import gradient_already_added
from simpo_megatron.loss.products import add_product, product
from simpo_megatron.loss.row_kernels import row_stats, slopes


def log_probs(hidden_SBH: Tensor, weight_vH: Tensor, call: HeadCall) -> Tensor:
    """Returns log p(target) of every response token, [N] fp32, natural log."""
    return _KernelLogProbs.apply(hidden_SBH, weight_vH, call)


class _KernelLogProbs(torch.autograd.Function):
    """Keeps logits as they are and never writes to them, so that a second backward finds them."""

    @staticmethod
    def forward(ctx: Any, hidden_SBH: Tensor, weight_vH: Tensor, call: HeadCall) -> Tensor:
        rows_NH = call.selection.gather(hidden_SBH)
        work = _Work(rows_NH, weight_vH, call)
        stats_3N = torch.full((3, len(rows_NH)), -torch.inf, dtype=torch.float32, device=rows_NH.device)
        stats_3N[1].zero_()
        kept = [work.read(block, stats_3N, keep=index < work.num_kept) for index, block in enumerate(work.blocks)]
        lse_N, target_N = merge_shards(stats_3N[0] + stats_3N[1].log_(), stats_3N[2], call.tp_group)
        ctx.call, ctx.shape_SBH, ctx.main_grad = call, hidden_SBH.shape, call.main_grad(weight_vH)
        ctx.save_for_backward(weight_vH, rows_NH, lse_N, *kept[: work.num_kept])
        return target_N - lse_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight_vH, rows_NH, lse_N, *kept = ctx.saved_tensors
        work, selection = _Work(rows_NH, weight_vH, ctx.call), ctx.call.selection
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        hidden_grad = _RowsGradient(work) if needs_hidden else None
        weight_grad = _WeightGradient(work, ctx.main_grad) if needs_weight else None
        waiting = None
        for block, slopes_Nb in work.slopes(kept, lse_N, grad_N.contiguous()):
            if hidden_grad:
                hidden_grad.add(block, slopes_Nb)
            if weight_grad and block != work.blocks[-1]:
                weight_grad.add(block, slopes_Nb)
            waiting = slopes_Nb
        # The sum over ranks travels while the weight gradient of the last block, often the only one, is computed.
        pending = selection.start_reduce(hidden_grad.result()) if hidden_grad else None
        if weight_grad and waiting is not None:
            weight_grad.add(work.blocks[-1], waiting)
        return (
            selection.finish_reduce(pending, ctx.shape_SBH) if pending else None,
            weight_grad.result() if weight_grad else None,
            None,
        )


class _Work:
    """The logits of one block at a time; those that are not kept lie in one scratch tensor."""

    def __init__(self, rows_NH: Tensor, weight_vH: Tensor, call: HeadCall) -> None:
        self.rows_NH, self.weight_vH, self.call = rows_NH, weight_vH, call
        self.targets_N = call.device_targets_N
        self.dtype = call.logit_dtype
        self.cap = call.softcap.cap if call.softcap else 0.0
        plan = BlockPlan.of(
            len(rows_NH),
            call.width,
            logit_bytes=call.logit_dtype.itemsize,
            slope_bytes=rows_NH.dtype.itemsize,
            budget_bytes=call.budget_bytes,
        )
        self.blocks = plan.blocks
        self.num_kept = plan.num_kept if call.differentiable else 0
        self._scratch: dict[torch.dtype, Tensor] = {}

    def read(self, block: tuple[int, int], stats_3N: Tensor, *, keep: bool) -> Tensor:
        """Returns the block's logits, in a tensor of their own to `keep`, and merges them into the stats."""
        logits_Nb = self._new(block, self.dtype) if keep else self._reused(block, self.dtype)
        self._multiply(block, logits_Nb)
        row_stats(logits_Nb, self.targets_N, self.call.vocab_start + block[0], stats_3N, self.cap)
        return logits_Nb

    def slopes(self, kept: list[Tensor], lse_N: Tensor, grad_N: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yields each block and the gradient of its logits, in scratch that the next one overwrites."""
        for index, block in enumerate(self.blocks):
            out_Nb = self._reused(block, self.rows_NH.dtype)
            logits_Nb = kept[index] if index < len(kept) else self._reused(block, self.dtype)
            if index >= len(kept):
                self._multiply(block, logits_Nb)
            # A torch operator may not take the same tensor as input and as output.
            source_Nb = None if index >= len(kept) and self.dtype == out_Nb.dtype else logits_Nb
            slopes(source_Nb, out_Nb, self.targets_N, self.call.vocab_start + block[0], lse_N, grad_N, self.cap)
            yield block, out_Nb

    def _multiply(self, block: tuple[int, int], out_Nb: Tensor) -> None:
        product(self.rows_NH, self.weight_vH[slice(*block)].t(), out_Nb)

    def _new(self, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
        width = block[1] - block[0]
        return self.rows_NH.new_empty(len(self.rows_NH), round_up(width), dtype=dtype)[:, :width]

    def _reused(self, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if dtype not in self._scratch:
            self._scratch[dtype] = self._new(self.blocks[0], dtype)
        return self._scratch[dtype][:, : block[1] - block[0]]


class _RowsGradient:
    """Sums slopes @ W over blocks, in fp32 where there are several."""

    def __init__(self, work: _Work) -> None:
        self.work = work
        dtype = work.rows_NH.dtype if len(work.blocks) == 1 else torch.float32
        self.sum_NH = torch.empty_like(work.rows_NH, dtype=dtype)
        if not work.blocks:
            self.sum_NH.zero_()

    def add(self, block: tuple[int, int], slopes_Nb: Tensor) -> None:
        weight_bH = self.work.weight_vH[slice(*block)]
        if block[0] == 0:
            product(slopes_Nb, weight_bH, self.sum_NH)
        else:
            add_product(self.sum_NH, slopes_Nb, weight_bH)

    def result(self) -> Tensor:
        """Returns the gradient of the rows, [N, H] in their dtype, this rank's contribution."""
        return self.sum_NH.to(self.work.rows_NH.dtype)


class _WeightGradient:
    """Collects slopes^T @ rows, block by block, in a new tensor or on top of Megatron's `main_grad`."""

    def __init__(self, work: _Work, main_grad_vH: Tensor | None) -> None:
        self.work, self.main_grad_vH = work, main_grad_vH
        self.out_vH = torch.empty_like(work.weight_vH) if main_grad_vH is None else main_grad_vH
        if main_grad_vH is None:
            self.out_vH[work.blocks[-1][1] if work.blocks else 0 :].zero_()

    def add(self, block: tuple[int, int], slopes_Nb: Tensor) -> None:
        out_bH = self.out_vH[slice(*block)]
        if self.main_grad_vH is None:
            product(slopes_Nb.t(), self.work.rows_NH, out_bH)
        else:
            add_product(out_bH, slopes_Nb.t(), self.work.rows_NH)

    def result(self) -> Tensor | None:
        """Returns what autograd is to see: the gradient, or Megatron's stand-in for one already added."""
        if self.main_grad_vH is None:
            return self.out_vH
        return gradient_already_added(self.work.weight_vH)
