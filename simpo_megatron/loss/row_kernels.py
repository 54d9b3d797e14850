"""The two passes over logits that are no matrix product, as Triton kernels behind operators of torch.

Importable only where Triton is installed. As operators they have shapes on the meta device and names in a profile.
The width of a block is a constant of the kernel. A head has one or two widths, so the kernel is compiled once or
twice, and every version of Triton's interpreter can run the loop over it. Triton launches on the current GPU, which is
not always that of the tensors.

Shapes: N response tokens, b columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_COLUMNS_AT_ONCE = 4096
_NUM_WARPS = 8


@triton.jit
def _capped(logits, CAP: tl.constexpr):
    """cap * tanh(logit / cap), written with an exponential whose overflow gives the right limit."""
    return CAP * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / CAP)))


# Numbers of a microbatch: compiled once whether or not 16 divides them, and not again at some later step.
_VARYING = ["first_id", "num_rows"]


@triton.jit(do_not_specialize=_VARYING)
def _row_stats(
    logits,
    stride,
    targets,
    first_id,
    stats,
    num_rows,
    WIDTH: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of a row: its maximum, its sum of exponentials and the target's logit, merged into what was there."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    columns = tl.arange(0, BLOCK)
    # Every lane has a maximum and a sum of its own; they are merged once, when the row is done.
    max_b = tl.full((BLOCK,), float("-inf"), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        is_inside = start + columns < WIDTH
        z = tl.load(row + start + columns, mask=is_inside, other=float("-inf")).to(tl.float32)
        if CAP > 0:
            z = tl.where(is_inside, _capped(z, CAP), float("-inf"))
        new_b = tl.maximum(max_b, z)
        # Minus infinity less itself is no number; a lane that has seen nothing else has a sum of 0 whatever the shift.
        shift_b = tl.where(new_b == float("-inf"), 0.0, new_b)
        sum_b = sum_b * tl.exp(max_b - shift_b) + tl.exp(z - shift_b)
        max_b = new_b
    old_max = tl.load(stats + n)
    old_sum = tl.load(stats + num_rows + n)
    new_max = tl.maximum(old_max, tl.max(max_b, 0))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    new_sum = old_sum * tl.exp(old_max - shift) + tl.sum(sum_b * tl.exp(max_b - shift), 0)
    tl.store(stats + n, new_max)
    tl.store(stats + num_rows + n, new_sum)
    column = tl.load(targets + n) - first_id
    if (column >= 0) & (column < WIDTH):
        at_target = tl.load(row + column).to(tl.float32)
        if CAP > 0:
            at_target = _capped(at_target, CAP)
        tl.store(stats + 2 * num_rows + n, at_target)


@triton.jit(do_not_specialize=["first_id"])
def _slopes(
    logits,
    stride,
    out,
    out_stride,
    targets,
    first_id,
    lse,
    grad,
    WIDTH: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad * (onehot - exp(logit - lse)), times the slope of the cap: one read and one write, in place if so asked."""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    z = tl.load(logits + n * stride + columns, mask=is_inside, other=float("-inf")).to(tl.float32)
    column = tl.load(targets + n) - first_id
    factor = tl.load(grad + n)
    if CAP > 0:
        z = _capped(z, CAP)
        factor = factor * (1.0 - (z / CAP) * (z / CAP))
    slope = factor * (tl.where(columns == column, 1.0, 0.0) - tl.exp(z - tl.load(lse + n)))
    tl.store(out + n * out_stride + columns, slope.to(out.dtype.element_ty), mask=is_inside)


@torch.library.custom_op("simpo_megatron::row_stats", mutates_args={"stats_3N"})
def row_stats(logits_Nb: Tensor, targets_N: Tensor, first_id: int, stats_3N: Tensor, cap: float) -> None:
    """Merges a block of logits into the maximum, the sum of exponentials and the target's logit of each row.

    Args:
        logits_Nb: fp32 or bf16, contiguous rows.
        targets_N: int64, token ids.
        first_id: the id of the block's first column.
        stats_3N: fp32, contiguous; begins as -inf, 0 and -inf.
        cap: the soft cap; 0 for none.
    """
    num_rows, width = logits_Nb.shape
    with torch.cuda.device_of(logits_Nb):
        _row_stats[(num_rows,)](
            logits_Nb,
            logits_Nb.stride(0),
            targets_N,
            first_id,
            stats_3N,
            num_rows,
            WIDTH=width,
            CAP=cap,
            BLOCK=columns_at_once(width),
            num_warps=_NUM_WARPS,
        )


@row_stats.register_fake
def _(logits_Nb: Tensor, targets_N: Tensor, first_id: int, stats_3N: Tensor, cap: float) -> None:
    return None


@torch.library.custom_op("simpo_megatron::slopes", mutates_args={"out_Nb"})
def slopes(
    logits_Nb: Tensor | None,
    out_Nb: Tensor,
    targets_N: Tensor,
    first_id: int,
    lse_N: Tensor,
    grad_N: Tensor,
    cap: float,
) -> None:
    """Writes the gradient of the logits of a block.

    Args:
        logits_Nb: fp32 or bf16, contiguous rows; None: they lie in `out_Nb`, which is overwritten.
        out_Nb: contiguous rows, any float dtype.
        targets_N: int64, token ids.
        first_id: the id of the block's first column.
        lse_N: fp32, over the whole vocabulary.
        grad_N: fp32, the gradient of each token's log-probability.
        cap: the soft cap; 0 for none.
    """
    logits_Nb = out_Nb if logits_Nb is None else logits_Nb
    num_rows, width = logits_Nb.shape
    block = columns_at_once(width)
    with torch.cuda.device_of(logits_Nb):
        _slopes[(num_rows, triton.cdiv(width, block))](
            logits_Nb,
            logits_Nb.stride(0),
            out_Nb,
            out_Nb.stride(0),
            targets_N,
            first_id,
            lse_N,
            grad_N,
            WIDTH=width,
            CAP=cap,
            BLOCK=block,
            num_warps=_NUM_WARPS,
        )


@slopes.register_fake
def _(
    logits_Nb: Tensor | None,
    out_Nb: Tensor,
    targets_N: Tensor,
    first_id: int,
    lse_N: Tensor,
    grad_N: Tensor,
    cap: float,
) -> None:
    return None


def columns_at_once(width: int) -> int:
    """Returns the columns that a program works on at a time: a power of two, all of a narrow block."""
    return min(_MAX_COLUMNS_AT_ONCE, triton.next_power_of_2(width))
