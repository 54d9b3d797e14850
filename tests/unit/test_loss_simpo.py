"""The objective and the averages against a slow float64 reference written from the paper, values and gradients."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from simpo_megatron.errors import ConfigError
from simpo_megatron.loss import SimPOObjective, average_log_probs, preference_loss

# fp32 keeps 24 bits, 6e-8; a pair goes through about ten roundings, and the sigmoid multiplies the error of
# its argument by at most beta.
FP32 = 5e-6


def twin(logps, objective):
    """The loss summed over pairs, one by one, from float64 log-probabilities [(chosen, rejected), ...]."""
    total = 0.0
    num_chosen_tokens = sum(len(chosen) for chosen, _ in logps)
    for chosen, rejected in logps:
        rewards = []
        for response in (chosen, rejected):
            log_prob = response.sum()
            if objective.length_normalization == "mean":
                log_prob = log_prob / max(len(response), 1)
            if objective.alpha:
                log_prob = (1 - log_prob.exp() ** -objective.alpha) / objective.alpha
            rewards.append(objective.beta * log_prob)
        z = rewards[0] - rewards[1] - objective.beta * objective.gamma_beta_ratio
        if objective.loss_type == "hinge":
            total = total + torch.clamp(1 - z, min=0)
        else:
            wrong = objective.label_smoothing
            # -log sigmoid(z) = log(1 + exp(-z)), without overflow for any z
            total = total + (1 - wrong) * torch.logaddexp(torch.zeros_like(z), -z)
            total = total + wrong * torch.logaddexp(torch.zeros_like(z), z)
        if objective.sft_weight:
            nll = -chosen.sum()
            scales = {"token": len(logps) / num_chosen_tokens, "sequence": 1 / len(chosen), "sum": 1}
            scale = scales[objective.sft_normalization]
            total = total + objective.sft_weight * nll * scale
    return total


def make_pairs(lengths, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(-torch.rand(length, generator=generator, dtype=torch.float64) * 4 * scale for length in pair)
        for pair in lengths
    ]


def flat(pairs, dtype):
    """Inputs of the package: all tokens in one vector, shuffled, and the response of each."""
    responses = [response for pair in pairs for response in pair]
    logps = torch.cat(responses).to(dtype)
    sequence = torch.cat([torch.full((len(r),), i) for i, r in enumerate(responses)])
    order = torch.randperm(len(logps), generator=torch.Generator().manual_seed(1))
    return logps[order].detach().requires_grad_(), sequence[order], order


OBJECTIVES = {
    "paper": {},
    "large beta": {"beta": 10.0, "gamma_beta_ratio": 0.3},
    "hinge": {"loss_type": "hinge", "gamma_beta_ratio": 0.1},
    "smoothed": {"label_smoothing": 0.1},
    "sft by token": {"sft_weight": 0.7},
    "sft by sequence": {"sft_weight": 0.7, "sft_normalization": "sequence"},
    "sft by sum": {"sft_weight": 0.01, "sft_normalization": "sum"},
    "alphapo": {"alpha": 0.25, "beta": 2.5},
    "alphapo, negative": {"alpha": -0.5},
    "summed": {"length_normalization": "none", "beta": 0.1, "gamma_beta_ratio": 5.0},
    "summed hinge with sft": {"length_normalization": "none", "beta": 0.05, "loss_type": "hinge", "sft_weight": 0.3},
    "all": {"label_smoothing": 0.05, "sft_weight": 0.1, "alpha": 0.1},
}


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_the_float64_twin(options, dtype):
    objective = SimPOObjective(**options)
    pairs = make_pairs([(3, 7), (1, 1), (12, 5)])
    leaves = [response.clone().requires_grad_() for pair in pairs for response in pair]
    expected = twin(list(zip(leaves[0::2], leaves[1::2])), objective)
    expected_grad = torch.cat(torch.autograd.grad(expected, leaves))

    logps, sequence, order = flat(pairs, dtype)
    result = preference_loss(*average_log_probs(logps, sequence, 6), objective=objective)
    (grad,) = torch.autograd.grad(result.loss, logps)

    budget = FP32 if dtype == torch.float32 else 1e-12
    assert result.num_pairs == 3
    assert abs(result.loss.item() - expected.item()) <= budget * abs(expected.item())
    assert (grad - expected_grad[order]).abs().max() <= budget * expected_grad.abs().max()


def test_sums_are_those_of_the_pairs_and_detached():
    pairs = make_pairs([(2, 3), (4, 1)])
    logps, sequence, _ = flat(pairs, torch.float64)
    objective = SimPOObjective(beta=2.5, sft_weight=0.5)
    result = preference_loss(*average_log_probs(logps, sequence, 4), objective=objective)
    chosen = torch.stack([c.mean() for c, _ in pairs])
    rejected = torch.stack([r.mean() for _, r in pairs])
    expected = {
        "loss": twin(pairs, objective),
        "rewards/chosen": 2.5 * chosen.sum(),
        "rewards/rejected": 2.5 * rejected.sum(),
        "rewards/margins": 2.5 * (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).double().sum(),
        "logps/chosen": chosen.sum(),
        "logps/rejected": rejected.sum(),
        "response_length/chosen": 6,
        "response_length/rejected": 4,
        "sft_loss": -2 * torch.cat([c for c, _ in pairs]).sum() / 6,
    }
    assert result.sums.keys() == expected.keys()
    for key, value in expected.items():
        assert result.sums[key].item() == pytest.approx(float(value), rel=1e-12), key
        assert result.sums[key].dim() == 0 and not result.sums[key].requires_grad, key
    torch.testing.assert_close(result.chosen_avg_P, chosen)
    torch.testing.assert_close(result.rejected_avg_P, rejected)
    assert not result.chosen_avg_P.requires_grad


def test_sums_survive_a_loss_that_is_scaled_in_place():
    logps, sequence, _ = flat(make_pairs([(2, 3)]), torch.float32)
    result = preference_loss(*average_log_probs(logps, sequence, 2), objective=SimPOObjective())
    before = result.sums["loss"].item()
    result.loss.data.div_(7)
    assert result.sums["loss"].item() == before


def test_sft_term_by_token_does_not_depend_on_the_cut_into_microbatches():
    pairs = make_pairs([(3, 7), (1, 1), (12, 5), (2, 9)])
    objective = SimPOObjective(sft_weight=0.7)
    per_token = len(pairs) / sum(len(chosen) for chosen, _ in pairs)
    totals = []
    for cuts in ([0, 4], [0, 1, 4], [0, 2, 4], [0, 1, 2, 3, 4]):
        total = 0.0
        for start, stop in pairwise(cuts):
            logps, sequence, _ = flat(pairs[start:stop], torch.float64)
            averages = average_log_probs(logps, sequence, 2 * (stop - start))
            total += preference_loss(*averages, objective=objective, pairs_per_chosen_token=per_token).loss.item()
        totals.append(total)
    assert totals == pytest.approx([float(twin(pairs, objective))] * 4, rel=1e-12)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_huge_margins_stay_finite_and_exact(loss_type, margin):
    objective = SimPOObjective(beta=10.0, loss_type=loss_type)
    averages = torch.tensor([-1.0 + min(margin, 0), -1.0 - max(margin, 0)], requires_grad=True)
    result = preference_loss(averages, torch.tensor([1, 8192]), objective=objective)
    (grad,) = torch.autograd.grad(result.loss, averages)
    reference = averages.detach().double().requires_grad_()
    expected = twin([(reference[0:1], reference[1:2])], objective)
    (expected_grad,) = torch.autograd.grad(expected, reference)
    assert result.loss.item() == pytest.approx(expected.item(), rel=FP32, abs=1e-30)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=FP32, atol=1e-30)


def test_lengths_1_and_8192_keep_fp32_accuracy():
    pairs = make_pairs([(1, 8192), (8192, 1)])
    leaves = [response.clone().requires_grad_() for pair in pairs for response in pair]
    expected = torch.autograd.grad(twin(list(zip(leaves[0::2], leaves[1::2])), SimPOObjective()), leaves)
    logps, sequence, order = flat(pairs, torch.float32)
    averages, counts = average_log_probs(logps, sequence, 4)
    exact = torch.stack([response.mean() for pair in pairs for response in pair])
    # Only the token values and the result are rounded to fp32; the sum between them is not.
    assert (averages - exact).abs().max() <= 2 * 6e-8 * exact.abs().max()
    assert counts.tolist() == [1, 8192, 8192, 1]
    (grad,) = torch.autograd.grad(preference_loss(averages, counts, objective=SimPOObjective()).loss, logps)
    torch.testing.assert_close(grad.double(), torch.cat(expected)[order], rtol=FP32, atol=0)


def test_an_empty_response_has_average_zero_and_no_nan_gradient():
    logps = torch.tensor([-1.0, -3.0], requires_grad=True)
    averages, counts = average_log_probs(logps, torch.tensor([0, 0]), 4)
    assert averages.tolist() == [-2.0, 0.0, 0.0, 0.0] and counts.tolist() == [2, 0, 0, 0]
    objective = SimPOObjective(sft_weight=1.0)
    (grad,) = torch.autograd.grad(preference_loss(averages, counts, objective=objective).loss, logps)
    assert grad.isfinite().all() and (grad != 0).all()


def test_no_tokens_at_all_give_zero_gradient_and_no_nan():
    logps = torch.zeros(0, requires_grad=True)
    averages, counts = average_log_probs(logps, torch.zeros(0, dtype=torch.long), 2)
    result = preference_loss(averages, counts, objective=SimPOObjective(sft_weight=1.0))
    result.loss.backward()
    assert result.loss.isfinite() and logps.grad.shape == (0,)


def test_small_alpha_approaches_simpo():
    averages, counts = torch.tensor([-1.5, -2.5]), torch.tensor([3, 4])
    plain = preference_loss(averages, counts, objective=SimPOObjective()).loss
    nearly = preference_loss(averages, counts, objective=SimPOObjective(alpha=1e-7)).loss
    # r differs from the average by alpha * average**2 / 2; expm1 keeps the rest at fp32's roundings.
    assert nearly.item() == pytest.approx(plain.item(), rel=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": -1.0},
        {"beta": math.nan},
        {"beta": "2"},
        {"gamma_beta_ratio": -0.1},
        {"gamma_beta_ratio": math.inf},
        {"loss_type": "ipo"},
        {"label_smoothing": 0.5},
        {"label_smoothing": -0.1},
        {"label_smoothing": 0.1, "loss_type": "hinge"},
        {"sft_weight": -1.0},
        {"sft_normalization": "batch"},
        {"alpha": math.inf},
        {"alpha": 0.1, "length_normalization": "none"},
        {"length_normalization": "token"},
    ],
    ids=str,
)
def test_an_objective_outside_its_range_is_refused_by_name(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SimPOObjective(**options)


def test_gamma_is_beta_times_the_ratio():
    assert SimPOObjective(beta=2.5, gamma_beta_ratio=0.3).gamma == pytest.approx(0.75)


@pytest.mark.processes
def test_importing_the_loss_loads_neither_megatron_nor_transformers_nor_yaml():
    program = (
        "import sys, simpo_megatron.loss;"
        "unwanted = {'megatron', 'transformers', 'yaml', 'datasets', 'simpo_megatron.config'};"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
