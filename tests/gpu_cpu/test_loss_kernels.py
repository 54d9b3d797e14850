"""The Triton backend of the loss, run by Triton's interpreter, against dense float64 autograd and torch's backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from simpo_megatron.loss import ResponseTokens, VocabShard, fused_linear_log_probs

pytest.importorskip("triton", reason="Triton is not installed; make test-gpu-cpu has it")

from simpo_megatron.loss.row_kernels import row_stats, slopes

# Odd sizes; row 3 predicts two tokens; a frequent target; both ends of the vocabulary.
S, B, H, V, PADDED = 23, 1, 24, 1037, 1040
ROWS = torch.tensor([0, 3, 3, 4, 5, 8, 9, 11, 12, 17, 22])
TARGETS = torch.tensor([0, 1036, 7, 7, 7, 255, 256, 511, 512, 900, 7])
N = len(ROWS)
TOKENS = ResponseTokens(ROWS, TARGETS, torch.arange(N) // 3, 2)
VOCAB = VocabShard(start=0, size=V)
CAPS = [None, 3.0]
# Bytes a column of fp32 logits takes, and budgets for one block of all, several that stay, some that stay and none.
COLUMN = N * 4
BUDGETS = {
    "whole": 2 * V * COLUMN,
    "several": (V + 256) * COLUMN,
    "some kept": 700 * COLUMN,
    "none kept": 0,
}


def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, H, generator=generator, dtype=torch.float64)
    slope = torch.randn(N, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), slope


def dense(hidden: Tensor, weight: Tensor, slope: Tensor, cap: float | None = None) -> list[Tensor]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    logits = leaves[0].flatten(0, 1)[ROWS] @ leaves[1][:V].t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logp = logits.log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]
    return [logp.detach(), *torch.autograd.grad((logp * slope).sum(), leaves)]


def fused(hidden: Tensor, weight: Tensor, slope: Tensor, backend: str = "triton", **options) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in (hidden, weight)]
    logp = fused_linear_log_probs(*leaves, TOKENS, vocab=VOCAB, tp_group=None, backend=backend, **options)
    return [logp.detach(), *torch.autograd.grad((logp * slope.to(logp.dtype)).sum(), leaves)]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_fp32_values_and_gradients_are_those_of_float64(budget, cap):
    inputs = make(torch.float32)
    found = fused(*inputs, logits_budget_bytes=budget, logit_softcap=cap)
    for got, want in zip(found, dense(*inputs, cap)):
        # A product of 24, a sum of a thousand exponentials and the way back: some ten roundings of 1.2e-7.
        assert got.dtype == torch.float32 and relative(got, want) <= 2e-6


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("logit_dtype", [None, torch.float32], ids=["bf16 logits", "fp32 logits"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_bf16_errs_no_more_than_torchs_backend(budget, logit_dtype, cap):
    inputs = make(torch.bfloat16)
    options = {"logits_budget_bytes": budget, "logit_softcap": cap, "logit_dtype": logit_dtype}
    found, exact = fused(*inputs, **options), dense(*inputs, cap)
    for got, other, want in zip(found, fused(*inputs, backend="torch", **options), exact):
        # Triton's backend rounds the gradient of the logits to bf16 (a step is 4e-3), as plain autograd does. Both
        # round once more at the end, by half a step.
        assert relative(got, want) <= max(relative(other, want), 4e-3) + 2e-3


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("budget", [BUDGETS["whole"], 0], ids=["kept", "none kept"])
def test_fp32_logits_take_the_rounding_out_of_bf16_log_probs(backend, budget):
    inputs = make(torch.bfloat16)
    (rounded, *_), (wide, *_) = (
        fused(*inputs, backend, logits_budget_bytes=budget, logit_dtype=dtype) for dtype in (None, torch.float32)
    )
    exact = dense(*inputs)[0]
    # Rounding a logit to bf16 is off by 2e-3 of it; fp32 sums of products of bf16 numbers by some 1e-7.
    assert relative(rounded, exact) >= 1e-4 and relative(wide, exact) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("budget", [BUDGETS["whole"], 0], ids=["whole", "blocks"])
def test_main_grad_accumulates_by_megatrons_protocol(dtype, budget):
    hidden, weight, slope = make(dtype)
    expected = dense(hidden, weight, slope)[2]
    weight = torch.nn.Parameter(weight)
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(PADDED, H), False
    options = {"logits_budget_bytes": budget, "accumulate_into_main_grad": True, "backend": "triton"}
    for repeat in (1, 2):
        logp = fused_linear_log_probs(hidden.requires_grad_(), weight, TOKENS, vocab=VOCAB, tp_group=None, **options)
        (logp * slope.float()).sum().backward()
        assert relative(weight.main_grad - 1, repeat * expected) <= (1e-5 if dtype == torch.float32 else 2e-2)
    assert (weight.main_grad[V:] == 1).all() and weight.grad_added_to_main_grad


def test_padding_columns_take_no_part_and_get_zero_gradient():
    hidden, weight, slope = make(torch.float32)
    expected = dense(hidden, weight, slope)
    weight[V:] = torch.nan
    found = fused(hidden, weight, slope)
    assert all(relative(got, want) <= 2e-6 for got, want in zip(found[:2], expected))
    assert (found[2][V:] == 0).all() and relative(found[2], expected[2]) <= 2e-6


def test_logits_of_minus_infinity_and_of_huge_spread():
    hidden, weight, _ = make(torch.float32)
    hidden = hidden.abs()
    weight[:256] = -torch.inf
    weight[600:] *= 1e3
    tokens = dataclasses.replace(TOKENS, targets_N=TARGETS.clamp(min=300))
    logp = fused_linear_log_probs(
        hidden, weight, tokens, vocab=VOCAB, tp_group=None, backend="triton", logits_budget_bytes=0
    )
    logits = (hidden.double().flatten(0, 1) @ weight[:V].double().t())[ROWS]
    want = logits.log_softmax(-1).gather(1, tokens.targets_N[:, None])[:, 0]
    assert relative(logp, want) <= 2e-6


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, slope = make(torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    options = {"vocab": VOCAB, "tp_group": None, "backend": "triton", "logits_budget_bytes": BUDGETS["some kept"]}
    loss = (fused_linear_log_probs(*leaves, TOKENS, **options) * slope.float()).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, torch.autograd.grad(loss, leaves)))


def test_frozen_sides_and_microbatches_without_tokens():
    hidden, weight, slope = make(torch.float32)
    expected = dense(hidden, weight, slope)
    for index, (leaf, frozen) in enumerate([(hidden, weight), (weight, hidden)]):
        leaf.requires_grad_()
        logp = fused_linear_log_probs(hidden, weight, TOKENS, vocab=VOCAB, tp_group=None, backend="triton")
        (logp * slope.float()).sum().backward()
        assert relative(leaf.grad, expected[1 + index]) <= 2e-6 and frozen.grad is None
        leaf.requires_grad_(False).grad = None
    none = torch.zeros(0, dtype=torch.long)
    hidden.requires_grad_(), weight.requires_grad_()
    empty = ResponseTokens(none, none, none, 1)
    logp = fused_linear_log_probs(hidden, weight, empty, vocab=VOCAB, tp_group=None, backend="triton")
    logp.sum().backward()
    assert logp.shape == (0,) and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("cap", CAPS)
def test_shards_merge_to_the_whole_also_where_one_has_no_target(cap):
    """Both kernels on two slices of the vocabulary, of which the second holds no target of the first rows."""
    hidden, weight, slope = make(torch.float32)
    logp, hidden_grad, weight_grad = dense(hidden, weight, slope, cap)
    rows, grad = hidden.flatten(0, 1)[ROWS], slope.float()
    shards = [(0, 600), (600, V)]
    logits = [rows @ weight[start:stop].t() for start, stop in shards]
    stats = torch.zeros(2, 3, N)
    stats[:, [0, 2]] = -torch.inf
    for (start, _), block, shard in zip(shards, logits, stats):
        row_stats(block, TARGETS, start, shard, cap or 0.0)
    lse, target = torch.logsumexp(stats[:, 0] + stats[:, 1].log(), 0), stats[:, 2].amax(0)
    assert (stats[1, 2] == -torch.inf).sum() == 9, "the second slice holds two targets"
    assert relative(target - lse, logp) <= 2e-6
    found = torch.zeros_like(rows)
    for (start, stop), block in zip(shards, logits):
        out = torch.empty_like(block)
        slopes(block, out, TARGETS, start, lse, grad, cap or 0.0)
        found += out @ weight[start:stop]
        # Near the cap its slope is the small difference of two numbers near one.
        assert relative(out.t() @ rows, weight_grad[start:stop]) <= (1e-5 if cap else 2e-6)
    assert relative(torch.zeros(S, H).index_add_(0, ROWS, found), hidden_grad[:, 0]) <= 2e-6
