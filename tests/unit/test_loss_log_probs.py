"""Log-probabilities from logits on one rank, against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch

from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.loss import vocab_parallel_log_probs

TARGETS = torch.tensor([[0, 10, 3, -100], [-100, -100, -100, -100], [5, -100, 10, 0]])
WIDTH, SIZE = 13, 11  # two columns of padding


def logits_of(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def log_probs(logits, targets=TARGETS):
    return vocab_parallel_log_probs(logits, targets, tp_group=None, vocab_start=0, vocab_size=SIZE)


def dense(logits):
    logits = logits.detach().double().requires_grad_()
    logp = logits[..., :SIZE].log_softmax(-1).gather(-1, TARGETS.clamp(min=0)[..., None])[..., 0]
    logp = torch.where(TARGETS == -100, 0.0, logp)
    (grad,) = torch.autograd.grad((logp * slope()).sum(), logits)
    return logp.detach(), grad


def slope():
    return torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)


@pytest.mark.parametrize(
    # A sum of 11 exponentials and one subtraction: a few roundings; bf16 gradients round once, at 4e-3.
    ("dtype", "value", "gradient"),
    [(torch.float64, 1e-15, 1e-15), (torch.float32, 3e-7, 1e-6), (torch.bfloat16, 3e-7, 4e-3)],
    ids=["fp64", "fp32", "bf16"],
)
def test_values_and_gradients_equal_dense_autograd(dtype, value, gradient):
    logits = logits_of(dtype)
    copy = logits.clone()
    leaf = logits.requires_grad_()
    logp = log_probs(leaf)
    (grad,) = torch.autograd.grad((logp * slope().to(logp.dtype)).sum(), leaf)
    want, want_grad = dense(copy)
    assert logp.dtype == torch.promote_types(dtype, torch.float32) and grad.dtype == dtype
    assert (logp.double() - want).abs().max() <= value * want.abs().max()
    assert (grad.double() - want_grad).abs().max() <= gradient * want_grad.abs().max()
    assert torch.equal(logits.detach(), copy)


def test_gradcheck_in_float64():
    assert torch.autograd.gradcheck(log_probs, (logits_of().requires_grad_(),))


def test_ignored_positions_give_zero_even_where_logits_are_not_finite():
    logits = logits_of()
    logits[1] = torch.inf
    logits[0, 3] = torch.nan
    leaf = logits.requires_grad_()
    logp = log_probs(leaf)
    (grad,) = torch.autograd.grad(logp.sum(), leaf)
    ignored = TARGETS == -100
    assert (logp[ignored] == 0).all() and (grad[ignored] == 0).all()
    assert logp.isfinite().all() and grad.isfinite().all()


def test_minus_infinity_logits_are_probability_zero():
    logits = logits_of()
    logits[0, :, 1] = -torch.inf
    logits[0, 1, 10] = -torch.inf  # the target itself
    leaf = logits.requires_grad_()
    logp = log_probs(leaf)
    assert logp[0, 1] == -torch.inf
    (grad,) = torch.autograd.grad(logp[0, 0] + logp[2].sum(), leaf)
    want = logits.detach()[..., :SIZE].log_softmax(-1)
    assert logp[0, 0].item() == pytest.approx(want[0, 0, 0].item(), rel=1e-14)
    assert grad.isfinite().all() and grad[0, 0, 1] == 0


@pytest.mark.parametrize("bad", [-1, SIZE, WIDTH, -101], ids=str)
def test_an_id_outside_the_vocabulary_raises(bad):
    targets = TARGETS.clone()
    targets[2, 2] = bad
    with pytest.raises(DataError, match=f"found id {bad}, expected one of a vocabulary of 11"):
        log_probs(logits_of(), targets)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ConfigError, match="expected \\(3, 4\\)"):
        log_probs(logits_of(), TARGETS[0])
