"""The rotation of queries and keys on the CPU in one pass each way, by cosines and sines that all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NAME = "_rotary_factors"


def rotated(heads: Tensor, frequencies: Tensor, *, interleaved: bool, factor: float) -> Tensor:
    """`heads` [S, B, A, D], whose first R elements are turned by the angles `frequencies` [S, 1, 1, R], in radians.

    Values and gradients equal those of megatron's rotation to the last bit.

    Args:
        interleaved: element 2i turns with 2i + 1, else i with i + R / 2.
        factor: of cosines and sines.

    Source: megatron.core.models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd.
    """
    return _Rotated.apply(heads, _Factors.of(frequencies, factor, heads.dtype, interleaved))


@dataclass(frozen=True)
class _Factors:
    """Factors of each element and of the other one of its pair, in the forward and in the backward, [S, 1, 1, R]."""

    own: Tensor
    other: Tensor
    other_of_gradient: Tensor
    interleaved: bool

    @classmethod
    def of(cls, frequencies: Tensor, factor: float, dtype: torch.dtype, interleaved: bool) -> _Factors:
        """The factors of the angles `frequencies`, made once for all layers that are given the same tensor."""
        known = frequencies.__dict__.setdefault(_NAME, {})
        key = factor, dtype, interleaved
        if key not in known:
            cosines, sines = ((function(frequencies) * factor).to(dtype) for function in (torch.cos, torch.sin))
            _pairs(sines, interleaved)[0].neg_()
            known[key] = cls(cosines, sines, _swapped(sines, interleaved), interleaved)
        return known[key]

    def __call__(self, heads: Tensor, other: Tensor) -> Tensor:
        """A new tensor: `heads` times `own` and, of each pair, the other element times `other`."""
        size = self.own.size(-1)
        turning = heads[..., :size]
        out = _swapped(turning, self.interleaved).mul_(other).add_(turning * self.own)
        return out if size == heads.size(-1) else torch.cat((out, heads[..., size:]), dim=-1)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, factors: _Factors) -> Tensor:
        ctx.factors = factors
        return factors(heads, factors.other)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factors(grad, ctx.factors.other_of_gradient), None


def _swapped(x: Tensor, interleaved: bool) -> Tensor:
    """A new tensor with the elements of each pair in each other's place."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (out_first, out_second) = _pairs(x, interleaved), _pairs(out, interleaved)
    out_first.copy_(second)
    out_second.copy_(first)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
