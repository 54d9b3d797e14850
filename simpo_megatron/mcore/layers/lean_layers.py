"""RMSNorm and SwiGLU that save only their inputs for the backward, and the layer that does not save their outputs.

On the CPU they use torch's operations; on a GPU, torch's kernel for the norm and megatron's for SwiGLU.
Shapes: H hidden size, F the MLP's width on this tensor-parallel rank, `...` any before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.layers.recomputed import computed_by, recomputing


class LeanTransformerLayer(TransformerLayer):
    """megatron's transformer layer, whose matrices keep no outputs of norms and of SwiGLU for their gradients.

    Each is recomputed in the backward, which costs a pass over a tensor that is then in use anyway.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """megatron's outputs."""
        with recomputing():
            return super().forward(*args, **kwargs)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm under megatron's constructor, its weight marked for the sequence-parallel gradient all-reduce.

    megatron's own torch norm refuses sequence parallelism, because it lacks the mark that finalize_model_grads reads.
    It also refuses zero-centred weights (1 + weight), which are kept here as they are in the file.

    Source: arXiv 1910.07467.
    """

    def __init__(self, config: ArchitectureConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron's own mark
        self.is_zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, hidden: Tensor) -> Tensor:
        """The norm of the last dimension of [..., H], in the dtype of `hidden`, computed in fp32 at least."""
        # One plus a small weight would lose the weight in bf16.
        weight = 1 + self.weight.to(_wide(hidden.dtype)) if self.is_zero_centered else self.weight
        if hidden.device.type == "cpu":
            normed, rstd = _NormedRows.apply(hidden, weight, self.eps)
            return computed_by(normed, _scaled, hidden, rstd, weight)
        if weight.dtype == hidden.dtype:
            return F.rms_norm(hidden, self.normalized_shape, weight, self.eps)
        return _WidenedRows.apply(hidden, weight, self.eps)


class _NormedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = hidden.to(_wide(hidden.dtype))
        rstd = (torch.linalg.vecdot(wide, wide)[..., None] / hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight_H, rstd)
        ctx.mark_non_differentiable(rstd)
        return _scaled(hidden, rstd, weight_H), rstd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight_H, rstd = ctx.saved_tensors
        hidden_grad = weight_grad = None
        wide, grad = hidden.to(rstd.dtype), grad.to(rstd.dtype)
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * wide).flatten(0, -2).T.mv(rstd.flatten()).to(weight_H.dtype)
        if ctx.needs_input_grad[0]:
            scaled = grad * weight_H
            along = torch.linalg.vecdot(scaled, wide)[..., None] * rstd**3 / hidden.shape[-1]
            hidden_grad = scaled.mul_(rstd).addcmul_(wide, along, value=-1).to(hidden.dtype)
        return hidden_grad, weight_grad, None


def _scaled(hidden: Tensor, rstd: Tensor, weight_H: Tensor) -> Tensor:
    return (hidden.to(rstd.dtype) * rstd).mul_(weight_H).to(hidden.dtype)


class _WidenedRows(torch.autograd.Function):
    """torch's GPU kernel, which takes a weight only in the dtype of the rows, for a wider weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        normed, rstd = torch.ops.aten._fused_rms_norm(hidden.to(weight_H.dtype), weight_H.shape, weight_H, eps)
        ctx.save_for_backward(hidden, weight_H, rstd)
        return normed.to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight_H, rstd = ctx.saved_tensors
        hidden_grad, weight_grad = torch.ops.aten._fused_rms_norm_backward(
            grad.to(weight_H.dtype),
            hidden.to(weight_H.dtype),
            weight_H.shape,
            rstd,
            weight_H,
            list(ctx.needs_input_grad[:2]),
        )
        return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, None


class SwiGLU(MegatronModule):
    """The gated activation of an MLP, in place of Transformer Engine's in megatron: [..., 2F] to [..., F].

    Source: arXiv 2002.05202.
    """

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """silu(gate) * up in the dtype of the input, whose first half is the gate."""
        return computed_by(_GatedRows.apply(gate_and_up), _gated, gate_and_up)


class _GatedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return _gated(gate_and_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_and_up)
        gate_grad, up_grad = both.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return both


def _gated(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
