"""Megatron's linear layers add weight gradients to `main_grad` in fp32, by torch's product where apex is not."""

from __future__ import annotations

import pytest
import torch

from simpo_megatron.mcore import cpu_patches


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu_patches.install()


def error_after_three_microbatches(dtype: torch.dtype, *, fused: bool) -> float:
    """The relative error of `main_grad` against float64 sums over the same inputs, DDP's addition played here."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=2,
        params_dtype=dtype,
        gradient_accumulation_fusion=fused,
        use_cpu_initialization=True,
    )
    torch.manual_seed(4)
    layer = ColumnParallelLinear(24, 40, config=config, init_method=torch.nn.init.normal_, bias=False)
    layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.zeros(40, 24), False
    expected = torch.zeros(40, 24, dtype=torch.float64)
    for _ in range(3):
        rows = torch.randn(17, 1, 24).to(dtype).requires_grad_()
        gradient = torch.randn(17, 1, 40).to(dtype)
        layer(rows)[0].backward(gradient)
        assert layer.weight.grad_added_to_main_grad is fused
        if not fused:
            layer.weight.main_grad.add_(layer.weight.grad)
        layer.weight.grad = None
        expected += gradient.flatten(0, 1).double().t() @ rows.detach().flatten(0, 1).double()
    return float((layer.weight.main_grad.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_microbatches_are_those_of_fp32(tp_group, dtype):
    # 51 products of 8 or 24 bits are added, each sum rounded to 24 bits, 6e-8: their errors do not reach 1e-6.
    assert error_after_three_microbatches(dtype, fused=True) <= 1e-6


def test_a_gradient_of_bf16_for_every_microbatch_is_not_as_exact(tp_group):
    assert error_after_three_microbatches(torch.bfloat16, fused=False) >= 1e-3
