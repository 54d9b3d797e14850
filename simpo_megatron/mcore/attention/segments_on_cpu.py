"""Attention of all segments of a pack on the CPU, which keeps queries, keys, values and outputs of each token once.

Shapes: S sequence, B batch, L queries of a segment, T its keys, A attention heads, G key/value groups, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.mcore.microbatch import Segment
from simpo_megatron.mcore.varlen_kernels import Scores

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_kernel_has(scores: Scores, query: Tensor, key: Tensor) -> bool:
    """True if torch's kernel for the CPU computes these scores, of these heads."""
    if query.device.type != "cpu" or scores.softcap is not None or scores.dropout:
        return False
    # Older kernels take as many keys as queries.
    return query.size(-2) == key.size(-2) or torch.__version__ >= "2.9"


def attend_segments(
    query_SBAD: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    segments: Sequence[Segment],
    masks: Sequence[Tensor | None],
    scale: float | None,
) -> Tensor:
    """[S, B, A*D], by one call of torch's kernel for each segment.

    Args:
        segments: tile [0, S) in order; each prefix lies before its segment.
        masks: for each segment what is added to its scores, [L, T] in the dtype of the queries; None where it is
            causal, without a prefix.
    """
    return _Attend.apply(query_SBAD, key_SBGD, value_SBGD, segments, masks, scale)


class _Attend(torch.autograd.Function):
    """The attention; autograd alone would keep a prompt's keys for each response, and outputs in two orders."""

    @staticmethod
    def forward(
        ctx: Any,
        query_SBAD: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        segments: Sequence[Segment],
        masks: Sequence[Tensor | None],
        scale: float | None,
    ) -> Tensor:
        outputs, sums = [], []
        for segment, mask_LT in zip(segments, masks, strict=True):
            out_BALD, sum_BAL = _KERNEL(
                *_inputs(query_SBAD, key_SBGD, value_SBGD, segment),
                0.0,
                mask_LT is None,
                attn_mask=mask_LT,
                scale=scale,
            )
            outputs.append(out_BALD.permute(2, 0, 1, 3))
            sums.append(sum_BAL)
        out_SBAD = outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)
        ctx.segments, ctx.masks, ctx.scale = segments, masks, scale
        ctx.save_for_backward(query_SBAD, key_SBGD, value_SBGD, out_SBAD, *sums)
        return out_SBAD.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query_SBAD, key_SBGD, value_SBGD, out_SBAD, *sums = ctx.saved_tensors
        grad_SBAD = grad.view(out_SBAD.shape)
        query_grad_SBAD, key_grad_SBGD, value_grad_SBGD = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_SBAD, key_SBGD, value_SBGD)
        )
        for segment, mask_LT, sum_BAL in zip(ctx.segments, ctx.masks, sums, strict=True):
            own = slice(segment.start, segment.end)
            of_query, of_key, of_value = _KERNEL_BACKWARD(
                _heads_first(grad_SBAD[own]),
                *_inputs(query_SBAD, key_SBGD, value_SBGD, segment),
                _heads_first(out_SBAD[own]),
                sum_BAL,
                0.0,
                mask_LT is None,
                attn_mask=mask_LT,
                scale=ctx.scale,
            )
            query_grad_SBAD[own] = of_query.permute(2, 0, 1, 3)
            _add(key_grad_SBGD, of_key.permute(2, 0, 1, 3), segment)
            _add(value_grad_SBGD, of_value.permute(2, 0, 1, 3), segment)
        return query_grad_SBAD, key_grad_SBGD, value_grad_SBGD, None, None, None


def _inputs(query_SBAD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, segment: Segment) -> list[Tensor]:
    """Queries [B, A, L, D], keys and values [B, G, T, D] of one segment, as the kernel takes them."""
    own = query_SBAD[segment.start : segment.end]
    return [_heads_first(x) for x in (own, _keys(key_SBGD, segment), _keys(value_SBGD, segment))]


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def _keys(rows_SBGD: Tensor, segment: Segment) -> Tensor:
    """[T, B, G, D] of one segment: its prefix and its own rows."""
    own = rows_SBGD[segment.start : segment.end]
    if segment.prefix_start == segment.prefix_end:
        return own
    return torch.cat((rows_SBGD[segment.prefix_start : segment.prefix_end], own))


def _add(total_SBGD: Tensor, grad_TBGD: Tensor, segment: Segment) -> None:
    """Write the gradient of a segment's own rows, and add that of its prefix, which an earlier segment has written."""
    num_before = segment.prefix_end - segment.prefix_start
    total_SBGD[segment.start : segment.end] = grad_TBGD[num_before:]
    if num_before:
        total_SBGD[segment.prefix_start : segment.prefix_end] += grad_TBGD[:num_before]
