"""The head's log-probabilities in torch's own operations, vocabulary block by block: the reference, and the CPU's form.

A block's exponentials are kept for the backward while a byte budget lasts, and recomputed past it.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, H hidden, v this rank's vocabulary
slice, b one block of it, N response tokens, n those of them whose target lies in the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.loss.head import HeadCall
from simpo_megatron.loss.log_probs import merge_shards
from simpo_megatron.loss.main_grad import gradient_already_added
from simpo_megatron.loss.products import product

MIN_BLOCK_WIDTH, MAX_BLOCK_WIDTH = 64, 4096


def log_probs(hidden_SBH: Tensor, weight_vH: Tensor, call: HeadCall) -> Tensor:
    """Returns log p(target) of every response token, [N] fp32 (float64 for float64), natural log."""
    layout = _Layout.of(call, dtype=hidden_SBH.dtype)
    return _FusedLinearLogProbs.apply(hidden_SBH, weight_vH, _Head(call, layout))


@dataclass(frozen=True)
class _Block:
    """Columns [start, stop) of this rank's slice, and where in the sorted targets their targets lie."""

    start: int
    stop: int
    targets: slice


@dataclass(frozen=True)
class _Layout:
    """The blocks of the vocabulary slice, and the number of them that is kept for the backward.

    token_n: int64, the tokens whose target this rank holds, in the order of their targets.
    column_n: int64, ascending, the column of each of those targets in this rank's slice.
    num_kept: the number of leading blocks whose exponentials are kept for the backward.
    width: columns of this rank's slice that are real token ids.
    """

    token_n: Tensor
    column_n: Tensor
    blocks: tuple[_Block, ...]
    num_kept: int
    width: int

    @classmethod
    def of(cls, call: HeadCall, dtype: torch.dtype) -> _Layout:
        """Returns the layout for logits of which `dtype` is kept."""
        targets_N, width = call.targets_N, call.width
        num_bytes_column = max(targets_N.numel(), 1) * dtype.itemsize
        budget = call.budget_bytes // num_bytes_column
        # An eighth of the budget for the block in work leaves the rest to blocks kept.
        block_width = min(max(budget // 8, MIN_BLOCK_WIDTH), MAX_BLOCK_WIDTH)
        num_blocks = -(-width // block_width)
        block_width = -(-width // max(num_blocks, 1))
        # The block in work, once more in fp32, and its slopes.
        num_wide_blocks = (dtype.itemsize < 4) + (call.softcap is not None)
        budget -= num_wide_blocks * block_width * max(4, dtype.itemsize) // dtype.itemsize
        num_kept = num_blocks if num_blocks * block_width <= budget else budget // max(block_width, 1) - 1

        column_N, order_N = (targets_N - call.vocab_start).sort(stable=True)
        starts = [min(i * block_width, width) for i in range(num_blocks + 1)]
        cuts = torch.searchsorted(column_N, torch.tensor(starts)).tolist()
        if call.device_targets_N is not targets_N:
            # Sorted on the device: a copy from pageable memory would make the host wait.
            column_N, order_N = (call.device_targets_N - call.vocab_start).sort(stable=True)
        own = slice(cuts[0], cuts[-1])
        blocks = tuple(
            _Block(starts[i], starts[i + 1], slice(cuts[i] - cuts[0], cuts[i + 1] - cuts[0])) for i in range(num_blocks)
        )
        return cls(order_N[own], column_N[own], blocks, max(num_kept, 0) if call.differentiable else 0, width)

    def targets_in(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Returns the tokens whose target lies in the block, and its column in the block, both [n]."""
        return self.token_n[block.targets], self.column_n[block.targets] - block.start


@dataclass(frozen=True)
class _Head:
    """A call with the layout of its blocks."""

    call: HeadCall
    layout: _Layout


class _FusedLinearLogProbs(torch.autograd.Function):
    """Three GEMMs per vocabulary block that is kept, four per block that is not.

    A block's logits z become e = exp(z - shift) in place; shift is the running maximum of the row. Once lse is
    known, the softmax of the row is e * exp(shift - lse). The backward never builds it: the factor is applied
    to the [N, H] side of both GEMMs. The target's part is a row of W or of the hidden states. So kept blocks
    are only read. Under a soft cap, e times the slope of the cap is kept instead.
    """

    @staticmethod
    def forward(ctx: Any, hidden_SBH: Tensor, weight_vH: Tensor, head: _Head) -> Tensor:
        layout, softcap = head.layout, head.call.softcap
        rows_NH = head.call.selection.gather(hidden_SBH)
        work = _BlockWork(rows_NH, weight_vH, head)
        sum_N = rows_NH.new_zeros(rows_NH.shape[0], dtype=work.dtype)
        # Finite, so that a row that is -inf so far subtracts to -inf and not to NaN.
        max_N = torch.full_like(sum_N, torch.finfo(work.dtype).min)
        target_N = torch.full_like(max_N, -torch.inf)
        kept, shifts = [], []
        for index, block in enumerate(layout.blocks):
            keep = index < layout.num_kept
            stored_Nb = work.logits(block, fresh=keep)
            logits_Nb = work.capped(work.widened(block, stored_Nb))
            token_n, column_n = layout.targets_in(block)
            target_N[token_n] = logits_Nb[token_n, column_n].to(work.dtype)
            shift_N = torch.maximum(max_N, logits_Nb.amax(1))
            slopes_Nb = softcap.slope(logits_Nb) if keep and softcap else None
            exps_Nb = work.exponentials(logits_Nb, shift_N)
            sum_N = sum_N * torch.exp(max_N - shift_N) + exps_Nb.sum(1)
            max_N = shift_N
            if keep:
                exps_Nb = exps_Nb if slopes_Nb is None else exps_Nb.mul_(slopes_Nb)
                kept.append(stored_Nb if exps_Nb is stored_Nb else stored_Nb.copy_(exps_Nb))
                shifts.append(shift_N)
        lse_N, target_N = merge_shards(max_N + torch.log(sum_N), target_N, head.call.tp_group)
        ctx.head, ctx.shape_SBH = head, hidden_SBH.shape
        ctx.main_grad = head.call.main_grad(weight_vH)
        ctx.save_for_backward(weight_vH, rows_NH, lse_N, target_N, *kept, *shifts)
        return target_N - lse_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        head, layout, softcap = ctx.head, ctx.head.layout, ctx.head.call.softcap
        weight_vH, rows_NH, lse_N, target_N, *saved = ctx.saved_tensors
        kept, shifts = saved[: layout.num_kept], saved[layout.num_kept :]
        work = _BlockWork(rows_NH, weight_vH, head)
        slope_N = softcap.slope(target_N) if softcap else None
        hidden_grad = _HiddenGrad(work, grad_N, slope_N) if ctx.needs_input_grad[0] else None
        weight_grad = _WeightGrad(work, grad_N, slope_N, ctx.main_grad) if ctx.needs_input_grad[1] else None

        for block in layout.blocks[layout.num_kept :]:
            stored_Nb = work.logits(block, fresh=False)
            logits_Nb = work.capped(work.widened(block, stored_Nb))
            slopes_Nb = softcap.slope(logits_Nb) if softcap else None
            exps_Nb = work.exponentials(logits_Nb, lse_N)
            exps_Nb = exps_Nb if slopes_Nb is None else exps_Nb.mul_(slopes_Nb)
            exps_Nb = stored_Nb if exps_Nb is stored_Nb else stored_Nb.copy_(exps_Nb)
            ones_N = torch.ones_like(lse_N)
            if hidden_grad:
                hidden_grad.add(block, exps_Nb, ones_N)
            if weight_grad:
                weight_grad.add(block, exps_Nb, ones_N)
        work.release()
        scales = [torch.exp(shift_N - lse_N) for shift_N in shifts]
        kept_blocks = list(zip(layout.blocks, kept, scales, strict=False))
        pending = None
        if hidden_grad:
            for block, exps_Nb, scale_N in kept_blocks:
                hidden_grad.add(block, exps_Nb, scale_N)
            # The sum over ranks travels while the weight gradient of the kept blocks is computed.
            pending = head.call.selection.start_reduce(hidden_grad.result())
        if weight_grad:
            for block, exps_Nb, scale_N in kept_blocks:
                weight_grad.add(block, exps_Nb, scale_N)
        return (
            head.call.selection.finish_reduce(pending, ctx.shape_SBH) if pending else None,
            weight_grad.result() if weight_grad else None,
            None,
        )


class _BlockWork:
    """Logits and exponentials of one block at a time, in buffers that are allocated once."""

    def __init__(self, rows_NH: Tensor, weight_vH: Tensor, head: _Head) -> None:
        self.rows_NH, self.weight_vH, self.layout, self.softcap = rows_NH, weight_vH, head.layout, head.call.softcap
        self.dtype = torch.promote_types(rows_NH.dtype, torch.float32)
        self.is_widened = head.call.logit_dtype != rows_NH.dtype
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._rows: Tensor | None = None

    def logits(self, block: _Block, *, fresh: bool) -> Tensor:
        """Returns the block's logits [N, b], in a tensor of their own when `fresh`."""
        shape = (self.rows_NH.shape[0], block.stop - block.start)
        out_Nb = self.rows_NH.new_empty(shape) if fresh else self._buffer(shape, self.rows_NH.dtype)
        return out_Nb if self.is_widened else self._multiply(block, out_Nb)

    def widened(self, block: _Block, logits_Nb: Tensor) -> Tensor:
        """Returns the logits in the dtype that was asked for: the same, or a product of its own in a buffer."""
        if not self.is_widened:
            return logits_Nb
        return self._multiply(block, self._buffer(logits_Nb.shape, self.dtype))

    def capped(self, logits_Nb: Tensor) -> Tensor:
        """Returns the logits under the soft cap: the same without one, else in fp32 at least, like `exponentials`."""
        if self.softcap is None:
            return logits_Nb
        in_place = logits_Nb.dtype == self.dtype
        out_Nb = logits_Nb if in_place else self._buffer(logits_Nb.shape, self.dtype).copy_(logits_Nb)
        return self.softcap.apply_(out_Nb)

    def exponentials(self, logits_Nb: Tensor, shift_N: Tensor) -> Tensor:
        """Returns exp(logits - shift) in fp32 at least: in place where the logits are, else in a buffer."""
        in_place = logits_Nb.dtype == self.dtype
        out_Nb = logits_Nb if in_place else self._buffer(logits_Nb.shape, self.dtype)
        return torch.sub(logits_Nb, shift_N[:, None], out=out_Nb).exp_()

    def rows_buffer(self) -> Tensor:
        """Returns scratch of the shape and dtype of the rows; each call hands out the same tensor."""
        if self._rows is None:
            self._rows = torch.empty_like(self.rows_NH)
        return self._rows

    def release(self) -> None:
        """Gives back the buffers of blocks that are not kept."""
        self._buffers.clear()

    def _multiply(self, block: _Block, out_Nb: Tensor) -> Tensor:
        return product(self.rows_NH, self.weight_vH[block.start : block.stop].t(), out_Nb)

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype not in self._buffers:
            first = self.layout.blocks[0]
            self._buffers[dtype] = self.rows_NH.new_empty(shape[0] * (first.stop - first.start), dtype=dtype)
        return self._buffers[dtype][: shape[0] * shape[1]].view(shape)


class _HiddenGrad:
    """Sums grad * (W[target] - softmax @ W) over blocks, in fp32 at least; slope_N: the soft cap's at the target."""

    def __init__(self, work: _BlockWork, grad_N: Tensor, slope_N: Tensor | None) -> None:
        self.work, self.grad_N, self.slope_N = work, grad_N, slope_N
        self.sum_NH = torch.zeros_like(work.rows_NH, dtype=work.dtype)

    def add(self, block: _Block, exps_Nb: Tensor, scale_N: Tensor) -> None:
        weight_bH = self.work.weight_vH[block.start : block.stop]
        product_NH = torch.mm(exps_Nb, weight_bH, out=self.work.rows_buffer())
        self.sum_NH.addcmul_(product_NH.to(self.sum_NH.dtype), scale_N[:, None], value=-1)
        token_n, column_n = self.work.layout.targets_in(block)
        at_target_nH = weight_bH[column_n].to(self.sum_NH.dtype)
        if self.slope_N is not None:
            at_target_nH *= self.slope_N[token_n, None]
        self.sum_NH.index_add_(0, token_n, at_target_nH)

    def result(self) -> Tensor:
        """Returns the gradient of the rows, [N, H] in their dtype, this rank's contribution."""
        return self.sum_NH.mul_(self.grad_N[:, None]).to(self.work.rows_NH.dtype)


class _WeightGrad:
    """Collects the weight gradient, block by block, in a new tensor or on top of Megatron's `main_grad`.

    Many tokens may have one target: index_put_ adds them in a fixed order, index_add_ on a GPU does not.
    """

    def __init__(self, work: _BlockWork, grad_N: Tensor, slope_N: Tensor | None, main_grad_vH: Tensor | None) -> None:
        self.work, self.grad_N, self.main_grad_vH = work, grad_N, main_grad_vH
        self.target_grad_N = grad_N if slope_N is None else grad_N * slope_N
        self.out_vH = torch.empty_like(work.weight_vH) if main_grad_vH is None else main_grad_vH
        if main_grad_vH is None:
            self.out_vH[work.layout.width :].zero_()

    def add(self, block: _Block, exps_Nb: Tensor, scale_N: Tensor) -> None:
        work = self.work
        token_n, column_n = work.layout.targets_in(block)
        out_bH = self.out_vH[block.start : block.stop]
        scaled_NH = torch.mul(work.rows_NH, -(self.grad_N * scale_N)[:, None], out=work.rows_buffer())
        at_target_nH = work.rows_NH[token_n] * self.target_grad_N[token_n, None]
        keep_old = self.main_grad_vH is not None
        if out_bH.dtype == exps_Nb.dtype == work.dtype:
            torch.addmm(out_bH, exps_Nb.t(), scaled_NH, beta=int(keep_old), out=out_bH)
            out_bH.index_put_((column_n,), at_target_nH, accumulate=True)
            return
        block_bH = torch.mm(exps_Nb.t(), scaled_NH).to(work.dtype)
        block_bH.index_put_((column_n,), at_target_nH, accumulate=True)
        if keep_old:
            out_bH.add_(block_bH)
        else:
            out_bH.copy_(block_bH)

    def result(self) -> Tensor | None:
        """Returns what autograd is to see: the gradient, or Megatron's stand-in for one already added."""
        if self.main_grad_vH is None:
            return self.out_vH
        return gradient_already_added(self.work.weight_vH)
