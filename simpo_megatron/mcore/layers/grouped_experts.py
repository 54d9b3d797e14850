"""Grouped GEMMs of an MoE's experts by torch's grouped product, where Transformer Engine is not installed.

The experts stay megatron's SequentialMLP, with its parameters and its checkpoints. Only the launches differ: one for
all experts of a rank instead of one each, for products, activation and its gradient. Weight gradients are computed
expert by expert: torch's grouped product would round them to bf16 before they reach `main_grad`.

Shapes: T tokens of a rank's experts, in their order; E experts; H hidden size, N outputs and K inputs of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from simpo_megatron.loss.main_grad import gradient_already_added
from simpo_megatron.loss.products import add_product
from simpo_megatron.mcore.microbatch import copied_together

# The rows of the operands must start at multiples of 16 bytes.
_MULTIPLE = 8


def has_grouped_product(compute_capability: tuple[int, int] | None) -> bool:
    """True where torch has a kernel of it: on Hopper and data-centre Blackwell; elsewhere it loops over the experts.

    Source: aten/src/ATen/native/cuda/GroupedBlas.cpp.
    """
    return hasattr(torch, "_grouped_mm") and compute_capability is not None and compute_capability[0] in (9, 10)


class GroupedExperts(SequentialMLP):
    """megatron's experts with weights that are contiguous in memory, and then multiplied in one launch.

    A distributed optimizer moves the weights into its buffer, last expert first, with gaps where a bucket ends. Then
    tokens are taken last expert first; with gaps, experts are computed one by one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("linear_fc1", "linear_fc2"):
            _lay_together([getattr(expert, name).weight for expert in self.local_experts])

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H], each expert's outputs times the probabilities of its tokens, and no bias; arguments as megatron's."""
        rows_TH, probs_T = permuted_local_hidden_states, permuted_probs
        experts = list(self.local_experts)
        step = self._step(experts) if rows_TH.numel() else None
        if step is None:
            return super().forward(rows_TH, tokens_per_expert, probs_T)
        counts = tokens_per_expert.tolist()
        self._wait_for_weights(experts)
        ordered, groups = experts[::step], _Groups.of(counts[::step], rows_TH.device)
        mlp = SimpleNamespace(
            config=self.config,
            activation_func=experts[0].activation_func,
            linear_fc1=_GroupedLinear([expert.linear_fc1.weight for expert in ordered], groups, self.config),
            linear_fc2=_GroupedLinear([expert.linear_fc2.weight for expert in ordered], groups, self.config),
        )
        if step == 1:
            return MLP.forward(mlp, rows_TH, probs_T)
        output_TH, bias = MLP.forward(mlp, _turned(rows_TH, counts), _turned(probs_T, counts))
        return _turned(output_TH, counts[::-1]), bias

    def _step(self, experts: Sequence[MLP]) -> int | None:
        """1 where the weights lie in the experts' order, -1 in the other one, None where they do not lie evenly."""
        weights = [[getattr(expert, name).weight for expert in experts] for name in ("linear_fc1", "linear_fc2")]
        fits = all(size % _MULTIPLE == 0 for own in weights for size in own[0].shape)
        has_bias = experts[0].linear_fc1.bias is not None or experts[0].linear_fc2.bias is not None
        if len(experts) == 1 or not fits or has_bias or self.config.moe_apply_probs_on_input:
            return None
        return next((step for step in (1, -1) if all(_together(own[::step]) is not None for own in weights)), None)

    def _wait_for_weights(self, experts: Sequence[MLP]) -> None:
        """Run DistributedDataParallel's pre-forward hooks of each expert layer, whose own forward is not called."""
        for expert in experts:
            for layer in (expert, expert.linear_fc1, expert.linear_fc2):
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, ())


@dataclass(frozen=True)
class _Groups:
    """The tokens of each expert, in the order of its rows."""

    counts: list[int]
    offsets_E: Tensor
    """int32, on the device: the tokens up to the end of each group."""

    @classmethod
    def of(cls, counts: list[int], device: torch.device) -> _Groups:
        """The groups of these sizes, whose ends go to the device in a copy that the host does not wait for."""
        ends_E = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
        (offsets_E,) = copied_together((ends_E,), device)
        assert offsets_E is not None
        return cls(counts, offsets_E)


class _GroupedLinear(torch.nn.Module):
    """In the place of megatron's linear layer for one call: the products of each expert's rows and its weight."""

    def __init__(self, weights: list[Tensor], groups: _Groups, config: Any) -> None:
        super().__init__()
        # Not as parameters of its own.
        self._call = weights, groups, config.gradient_accumulation_fusion

    def forward(self, rows_TK: Tensor) -> tuple[Tensor, None]:
        weights, groups, is_fused = self._call
        return _GroupedProduct.apply(rows_TK, groups, is_fused, *weights), None


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TK: Tensor, groups: _Groups, is_fused: bool, *weights: Tensor) -> Tensor:
        ctx.groups, ctx.is_fused = groups, is_fused
        ctx.save_for_backward(rows_TK, *weights)
        weight_ENK = _together(weights)
        assert weight_ENK is not None, "looked at before"
        return grouped_product(rows_TK, weight_ENK.transpose(1, 2), groups.offsets_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        rows_TK, *weights = ctx.saved_tensors
        grad_TN = grad_TN.contiguous()
        rows_grad = None
        if ctx.needs_input_grad[0]:
            weight_ENK = _together(weights)
            assert weight_ENK is not None, "weights do not move between a forward and its backward"
            rows_grad = grouped_product(grad_TN, weight_ENK, ctx.groups.offsets_E)
        counts = ctx.groups.counts
        of_experts = zip(weights, grad_TN.split(counts), rows_TK.split(counts), strict=True)
        weight_grads = [
            _weight_gradient(*parts, is_fused=ctx.is_fused) if needed else None
            for parts, needed in zip(of_experts, ctx.needs_input_grad[3:], strict=True)
        ]
        return rows_grad, None, None, *weight_grads


def grouped_product(rows_TK: Tensor, weight_EKN: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, N]: the rows up to each offset times their expert's matrix, in the dtype of the rows."""
    product: Tensor = torch._grouped_mm(rows_TK, weight_EKN, offs=offsets_E)
    return product


def _weight_gradient(weight_NK: Any, grad_tN: Tensor, rows_tK: Tensor, *, is_fused: bool) -> Tensor | None:
    """The gradient of one expert's weight, or what stands for one that was added to `main_grad` as megatron's is."""
    if not is_fused:
        return grad_tN.t() @ rows_tK
    if len(rows_tK):
        add_product(weight_NK.main_grad, grad_tN.t(), rows_tK)
    return gradient_already_added(weight_NK)


def _lay_together(weights: Sequence[Tensor]) -> None:
    """Move equally shaped weights into one tensor; they stay separate parameters."""
    with torch.no_grad():
        for weight, place in zip(weights, torch.stack([weight.detach() for weight in weights]), strict=True):
            weight.data = place


def _together(weights: Sequence[Tensor]) -> Tensor | None:
    """A view [E, N, K] of weights at evenly spaced, ascending places of one storage; None for others."""
    first = weights[0]
    distance = weights[1].storage_offset() - first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for number, weight in enumerate(weights):
        is_there = weight.storage_offset() == first.storage_offset() + number * distance
        if not is_there or weight.untyped_storage().data_ptr() != storage or not weight.is_contiguous():
            return None
    if distance < first.numel() or distance % _MULTIPLE:
        return None
    return first.detach().as_strided((len(weights), *first.shape), (distance, *first.stride()), first.storage_offset())


def _turned(rows: Tensor, counts: list[int]) -> Tensor:
    """The groups of rows, last one first."""
    return torch.cat(rows.split(counts)[::-1])
