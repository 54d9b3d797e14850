"""The loss on the device against float64: log-probs and both gradients, at odd sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.gpu_check.timing import relative_error
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict
from simpo_megatron.loss import ResponseTokens, VocabShard, fused_linear_log_probs

FP32_BUDGET = 2e-6
"""For fp32 sums of a few thousand terms; TF32 is off by default."""
FP32_HIDDEN_BUDGET = 1e-5
"""For sums over the vocabulary. A GPU adds one column at a time: 2^-24 times the root of 32,061 of them. Such a
product, imitated on a CPU, was off by 3e-6 to 4.5e-6; a CPU's own product adds in blocks and is more exact."""
BF16_GRADIENT_BUDGET = 1.5e-2
"""For slopes that are rounded to bf16, 2^-8 each, before they are multiplied and summed."""
BF16_LOGP_FACTOR = 1.5
"""Multiple of the error that exact arithmetic has on logits rounded to bf16."""


@dataclass(frozen=True)
class _Case:
    dtype: torch.dtype
    softcap: float | None = None
    num_rows: int | None = None
    freezes_weight: bool = False
    adds_to_main_grad: bool = False

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch.")]
        parts += [f"cap {self.softcap:g}"] if self.softcap else []
        parts += [f"{self.num_rows} rows"] if self.num_rows is not None else []
        parts += ["frozen"] if self.freezes_weight else []
        return ", ".join([*parts, *(["main_grad twice"] if self.adds_to_main_grad else [])])


_CASES = [
    _case
    for dtype in (torch.float32, torch.bfloat16)
    for _case in (
        _Case(dtype),
        _Case(dtype, softcap=30.0),
        _Case(dtype, num_rows=1),
        _Case(dtype, num_rows=0),
        _Case(dtype, freezes_weight=True),
        _Case(dtype, adds_to_main_grad=True),
    )
]


def check_exactness(setting: CheckSetting) -> Verdict:
    """Checks that the errors of every case are within their budgets."""
    worst, failed = 0.0, []
    errors = {}
    for case in _CASES:
        found = _errors(case, setting)
        errors[str(case)] = {name: error for name, (error, _) in found.items()}
        for name, (error, budget) in found.items():
            worst = max(worst, error / budget)
            if not error <= budget:
                failed.append(f"{case}: {name} {error:.2g} > {budget:.2g}")
    value = "; ".join(failed[:3]) or f"{len(_CASES)} cases, the worst at {worst:.0%} of its budget"
    return Verdict.of(not failed, value, "fp32 2e-6, dH 1e-5; bf16 1.5 x exact, gradients 1.5e-2", errors=errors)


def _errors(case: _Case, setting: CheckSetting) -> dict[str, tuple[float, float]]:
    """(error, budget) of the log-probs and of each gradient."""
    length, hidden_size, vocab = setting.size(900, 23), setting.size(1024, 24), setting.size(32_061, 1037)
    padded = vocab + 3
    random = torch.Generator().manual_seed(0)
    num_rows = setting.size(700, 11) if case.num_rows is None else case.num_rows
    # Rows may repeat; a prompt's last row predicts two tokens.
    rows = torch.randint(0, length, (num_rows,), generator=random).sort().values
    targets = torch.randint(0, vocab, (num_rows,), generator=random)
    targets[:2] = torch.tensor([0, vocab - 1])[:num_rows]
    hidden = torch.randn(length, 1, hidden_size, generator=random).to(setting.device, case.dtype).requires_grad_()
    initial = torch.randn(padded, hidden_size, generator=random) * hidden_size**-0.5
    weight: Any = torch.nn.Parameter(initial.to(setting.device, case.dtype), requires_grad=not case.freezes_weight)
    slope = torch.randn(num_rows, generator=random).to(setting.device)
    tokens = ResponseTokens(rows, targets, torch.zeros(num_rows, dtype=torch.int64), num_pairs=1)
    if case.adds_to_main_grad:
        weight.main_grad = torch.zeros(padded, hidden_size, device=setting.device)
        weight.grad_added_to_main_grad = False
    times = 2 if case.adds_to_main_grad else 1
    for _ in range(times):
        logp = fused_linear_log_probs(
            hidden,
            weight,
            tokens,
            vocab=VocabShard(start=0, size=vocab),
            tp_group=None,
            logit_softcap=case.softcap,
            accumulate_into_main_grad=case.adds_to_main_grad,
        )
        (logp * slope).sum().backward()
    exact, *gradients = _in_float64(hidden, weight, rows, targets, slope, vocab, case.softcap)
    errors = {"logp": (_largest(logp.detach(), exact), _logp_budget(case, hidden, weight, rows, targets, exact, vocab))}
    is_wide = case.dtype == torch.float32
    assert hidden.grad is not None
    budget = FP32_HIDDEN_BUDGET if is_wide else BF16_GRADIENT_BUDGET
    errors["dH"] = (relative_error(hidden.grad, times * gradients[0]), budget)
    if not case.freezes_weight:
        found = weight.main_grad if case.adds_to_main_grad else weight.grad
        errors["dW"] = (relative_error(found, times * gradients[1]), FP32_BUDGET if is_wide else BF16_GRADIENT_BUDGET)
    return errors


def _in_float64(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, slope: Tensor, vocab: int, softcap: float | None
) -> list[Tensor]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    logits = leaves[0].flatten(0, 1)[rows.to(hidden.device)] @ leaves[1][:vocab].t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1).gather(1, targets.to(hidden.device)[:, None])[:, 0]
    return [logp.detach(), *torch.autograd.grad((logp * slope.double()).sum(), leaves)]


def _logp_budget(
    case: _Case, hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, exact: Tensor, vocab: int
) -> float:
    """The error of exact arithmetic on logits that are rounded once; in fp32 a constant, for values near 10."""
    if case.dtype == torch.float32 or not len(rows):
        return 10 * FP32_BUDGET
    with torch.no_grad():
        logits = (hidden.flatten(0, 1)[rows.to(hidden.device)] @ weight[:vocab].t()).double()
        logits = logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)
        rounded = logits.log_softmax(-1).gather(1, targets.to(hidden.device)[:, None])[:, 0]
    return BF16_LOGP_FACTOR * max(_largest(rounded, exact), 1e-3)


def _largest(found: Tensor, expected: Tensor) -> float:
    if not len(found):
        return 0.0
    difference = (found.double() - expected).abs().max()
    return float(difference) if bool(difference.isfinite()) else float("inf")


def check_large_indices(setting: CheckSetting) -> Verdict:
    """Checks sampled rows and columns against float64 where there are more logits than 32 bits count."""
    num_rows, hidden_size, vocab = setting.size(20_000, 40), setting.size(256, 16), setting.size(128_256, 1037)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_rows, 1, hidden_size, generator=random).to(setting.device, torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=random) * hidden_size**-0.5
    weight = torch.nn.Parameter(weight.to(setting.device, torch.bfloat16))
    targets = torch.randint(0, vocab, (num_rows,), generator=random)
    tokens = ResponseTokens(torch.arange(num_rows), targets, torch.zeros(num_rows, dtype=torch.int64), num_pairs=1)
    logp = fused_linear_log_probs(
        hidden, weight, tokens, vocab=VocabShard(start=0, size=vocab), tp_group=None, logits_budget_bytes=2**34
    )
    logp.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    # An index of 32 bits would miss the last ones.
    rows = torch.arange(num_rows)[:: max(1, num_rows // 50)].tolist() + [num_rows - 1]
    columns = torch.arange(vocab)[:: max(1, vocab // 50)].tolist() + [vocab - 1]
    with torch.no_grad():
        rows_NH, weight_vH, targets = hidden[:, 0].double(), weight.double(), targets.to(setting.device)
        logits = rows_NH[rows] @ weight_vH.t()
        sampled = logits.log_softmax(-1)
        of_rows = _largest(logp.detach()[rows], sampled.gather(1, targets[rows, None])[:, 0])
        slopes = torch.nn.functional.one_hot(targets[rows], vocab) - sampled.exp()
        hidden_error = relative_error(hidden.grad[rows, 0], slopes @ weight_vH)
        # A row's log-sum-exp follows from its log-prob, which is checked above.
        log_sums = (rows_NH * weight_vH[targets]).sum(-1) - logp.detach().double()
        slopes = (targets[:, None] == torch.tensor(columns, device=setting.device)).double()
        slopes -= (rows_NH @ weight_vH[columns].t() - log_sums[:, None]).exp()
        weight_error = relative_error(weight.grad[columns], slopes.t() @ rows_NH)
    holds = of_rows <= 0.1 and max(hidden_error, weight_error) <= 2 * BF16_GRADIENT_BUDGET
    value = f"{num_rows * vocab:,} logits: logp {of_rows:.2g}, dH {hidden_error:.2g}, dW {weight_error:.2g}"
    return Verdict.of(holds, value, "logp 0.1 of bf16 logits, gradients 3e-2")
