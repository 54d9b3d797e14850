"""Our RMSNorm and SwiGLU against torch's own operations in float64, and what they hold on to between the two passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.layers import RMSNorm, SwiGLU

H, EPS = 37, 1e-5
# A few roundings of the dtype's eps: a sum of H squares, its root, two products, and the same again on the way back.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def config(dtype: torch.dtype = torch.float32, **changes) -> ArchitectureConfig:
    return ArchitectureConfig(num_layers=1, hidden_size=H, num_attention_heads=1, params_dtype=dtype, **changes)


def rms_norm(dtype: torch.dtype, **changes) -> RMSNorm:
    norm = RMSNorm(config(dtype, **changes), H, eps=EPS)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    return norm


def slow_rms_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def slow_swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul_(3).to(dtype)


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).norm() / other.norm()
        assert error <= TOLERANCE[dtype], f"relative error {error}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_the_norm_and_its_gradients_are_those_of_float64(dtype, zero_centered):
    norm = rms_norm(dtype, layernorm_zero_centered_gamma=zero_centered)
    hidden, slope = random(5, 3, H, dtype=dtype).requires_grad_(), random(5, 3, H, dtype=dtype, seed=2)
    normed = norm(hidden)
    found = [normed, *torch.autograd.grad(normed, (hidden, norm.weight), slope)]
    leaves = [hidden.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()]
    twin = slow_rms_norm(leaves[0], leaves[1] + 1 if zero_centered else leaves[1])
    assert_close(found, [twin, *torch.autograd.grad(twin, leaves, slope.double())], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_and_its_gradient_are_those_of_float64(dtype):
    both, slope = random(5, 3, 2 * H, dtype=dtype).requires_grad_(), random(5, 3, H, dtype=dtype, seed=2)
    activated = SwiGLU(config())(both)
    leaf = both.detach().double().requires_grad_()
    twin = slow_swiglu(leaf)
    expected = [twin, *torch.autograd.grad(twin, leaf, slope.double())]
    assert_close([activated, *torch.autograd.grad(activated, both, slope)], expected, dtype)


def test_gradchecks():
    norm = rms_norm(torch.float64)
    assert torch.autograd.gradcheck(norm, (random(2, 3, H, dtype=torch.float64).requires_grad_(),))
    assert torch.autograd.gradcheck(SwiGLU(config()), (random(4, 6, dtype=torch.float64).requires_grad_(),))


def test_of_a_frozen_weight_there_is_no_gradient_and_of_the_input_the_same():
    norm, hidden = rms_norm(torch.float32), random(5, H, dtype=torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(norm(hidden).sum(), hidden)
    norm.weight.requires_grad_(False)
    (found,) = torch.autograd.grad(norm(hidden).sum(), hidden)
    assert torch.equal(found, expected)


def test_rows_of_zeros_and_of_large_numbers_stay_finite():
    norm = rms_norm(torch.float32)
    hidden = torch.stack((torch.zeros(H), torch.full((H,), 1e15), torch.full((H,), -1e-15))).requires_grad_()
    normed = norm(hidden)
    (grad,) = torch.autograd.grad(normed.sum(), hidden)
    assert normed.isfinite().all() and grad.isfinite().all()
    both = torch.tensor([[1e30, -1e30, 2.0, 2.0]], requires_grad=True)
    activated = SwiGLU(config())(both)
    assert torch.equal(activated.detach(), torch.tensor([[2e30, 0.0]]))
    (grad,) = torch.autograd.grad(activated.sum(), both)
    assert torch.equal(grad, torch.tensor([[2.0, 0.0, 1e30, 0.0]]))


def test_between_forward_and_backward_only_inputs_and_a_number_a_row_are_held():
    held: list[int] = []
    norm, swiglu = rms_norm(torch.float32), SwiGLU(config())
    hidden, both = (random(7, width, dtype=torch.float32).requires_grad_() for width in (H, 10))
    inputs = {hidden.data_ptr(), norm.weight.data_ptr(), both.data_ptr()}

    def hold(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in inputs:
            held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        norm(hidden), swiglu(both)
    assert held == [7]
