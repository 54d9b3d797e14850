"""Norms of a GPU without Transformer Engine: how many kernels they launch, and what they compute."""

from __future__ import annotations

import pytest
import torch
from counting import Counter, norms_of_a_gpu
from torch import Tensor
from torch._decomp import decomposition_table

from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.layers import RMSNorm
from simpo_megatron.mcore.layers.lean_layers import _WidenedRows

META = torch.device("meta")
H, EPS = 64, 1e-5


def norm_of(*, zero_centered: bool, dtype: torch.dtype = torch.bfloat16) -> RMSNorm:
    config = ArchitectureConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=1,
        params_dtype=dtype,
        layernorm_zero_centered_gamma=zero_centered,
    )
    return RMSNorm(config, H, eps=EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_the_norm_is_torchs_kernel_forward_and_backward(dtype, zero_centered):
    norm = norm_of(zero_centered=zero_centered, dtype=dtype).to(META)
    hidden = torch.empty(1000, 1, H, dtype=dtype, device=META, requires_grad=True)
    with norms_of_a_gpu(), Counter() as counter:
        out = norm(hidden)
        out.backward(torch.empty_like(out))
    assert out.dtype == dtype and hidden.grad.dtype == dtype and norm.weight.grad.dtype == dtype
    names = [operation.name for operation in counter.operations]
    assert names.count("_fused_rms_norm") == names.count("_fused_rms_norm_backward") == 1
    # Beside them at most: rows to fp32 and back, each way, where the weight is one plus what is stored.
    of_rows = [o.name for o in counter.operations if o.num_bytes > 1000 * H]
    assert len(of_rows) <= (2 + 5 if zero_centered and dtype == torch.bfloat16 else 2), of_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_with_a_wider_weight_values_and_gradients_are_those_of_float64(monkeypatch, dtype):
    """torch's kernel for the backward is a GPU's alone; its decomposition into other operations takes its place."""
    backward = decomposition_table[torch.ops.aten._fused_rms_norm_backward.default]
    monkeypatch.setattr(torch.ops.aten, "_fused_rms_norm_backward", backward)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(H, generator=generator).requires_grad_()
    slope = torch.randn(5, 3, H, generator=generator).to(dtype)
    out = _WidenedRows.apply(hidden, weight, EPS)
    found = [out, *torch.autograd.grad(out, (hidden, weight), slope)]
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    twin = leaves[0] / (leaves[0].square().mean(-1, keepdim=True) + EPS).sqrt() * leaves[1]
    expected = [twin, *torch.autograd.grad(twin, leaves, slope.double())]
    # One rounding to bf16 at the end, 2**-9; some of fp32.
    budget = {torch.bfloat16: 4e-3, torch.float32: 1e-6}
    for one, other, kind in zip(found, expected, (dtype, dtype, torch.float32), strict=True):
        assert one.dtype == kind
        assert relative_error(one, other) <= budget[kind]


def test_of_a_frozen_weight_no_gradient_is_asked_for(monkeypatch):
    asked = []

    def backward(grad: Tensor, hidden: Tensor, shape, rstd, weight, mask) -> tuple[Tensor, None]:
        asked.append(mask)
        return grad, None

    monkeypatch.setattr(torch.ops.aten, "_fused_rms_norm_backward", backward)
    hidden = torch.randn(3, H, requires_grad=True)
    _WidenedRows.apply(hidden, torch.ones(H), EPS).sum().backward()
    assert asked == [[True, False]]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
