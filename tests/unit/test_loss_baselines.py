"""CPO, ORPO, IPO and DPO against float64 references of the published formulas, and against TRL's own code.

A twin takes the token log-probabilities of one pair and writes the paper's equation down with whole probabilities and
logarithms; the package has averages and counts in fp32 alone.
"""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from simpo_megatron.errors import ConfigError
from simpo_megatron.loss import (
    CPOObjective,
    DPOObjective,
    IPOObjective,
    ORPOObjective,
    average_log_probs,
    preference_loss,
)

# fp32 keeps 24 bits, 6e-8. A log-probability summed over a response of 30 tokens is a number of about 60 whose error,
# 4e-6, meets the sigmoid times beta; the slope of IPO's square multiplies that of an average by its distance.
FP32, FP64 = 1e-5, 1e-12


def cpo(winner, loser, _, __, objective):
    """arXiv 2401.08417 eq. 3; the likelihood of eq. 5 is added by the caller."""
    return -torch.log(torch.sigmoid(objective.beta * winner.sum() - objective.beta * loser.sum()))


def orpo(winner, loser, _, __, objective):
    """arXiv 2403.07691 eq. 3, 4 and 7, times the lambda of eq. 6; its likelihood is added by the caller."""
    p_w, p_l = torch.exp(winner.sum() / len(winner)), torch.exp(loser.sum() / len(loser))
    odds_w, odds_l = p_w / (1 - p_w), p_l / (1 - p_l)
    return -objective.odds_ratio_weight * torch.log(torch.sigmoid(torch.log(odds_w / odds_l)))


def ipo(winner, loser, w_ref, l_ref, objective):
    """arXiv 2310.12036 eq. 17 of log-probabilities per token."""
    pi_w, pi_l, ref_w, ref_l = (x.mean().exp() for x in (winner, loser, w_ref, l_ref))
    h = torch.log(pi_w * ref_l / (pi_l * ref_w))
    return (h - 1 / objective.tau / 2) ** 2


def dpo(winner, loser, w_ref, l_ref, objective):
    """arXiv 2305.18290 eq. 7."""
    ratio_w, ratio_l = winner.sum() - w_ref.sum(), loser.sum() - l_ref.sum()
    return -torch.log(torch.sigmoid(objective.beta * ratio_w - objective.beta * ratio_l))


CASES = {
    "cpo": (CPOObjective(), cpo),
    "cpo, no likelihood": (CPOObjective(beta=0.05, sft_weight=0.0), cpo),
    "orpo": (ORPOObjective(), orpo),
    "orpo, lambda 1": (ORPOObjective(odds_ratio_weight=1.0), orpo),
    "ipo": (IPOObjective(), ipo),
    "ipo, tau 0.5": (IPOObjective(tau=0.5), ipo),
    "dpo": (DPOObjective(), dpo),
    "dpo, beta 0.5": (DPOObjective(beta=0.5), dpo),
    "dpo and likelihood": (DPOObjective(sft_weight=0.2), dpo),
    "dpo and likelihood of responses": (DPOObjective(sft_weight=0.01, sft_normalization="sum"), dpo),
}
LENGTHS = [(3, 7), (1, 1), (30, 12)]


def make_pairs(seed):
    """[(chosen, rejected), ...] of float64 token log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(-4 * torch.rand(length, generator=generator, dtype=torch.float64) for length in pair) for pair in LENGTHS
    ]


def moved(pairs, scale=0.2):
    """Log-probs of the same tokens under a reference model near the policy."""
    generator = torch.Generator().manual_seed(7)
    return [tuple(x + scale * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in pair) for pair in pairs]


def averages(pairs, dtype):
    """(average log-probability, length) of each response, as the loss takes them, of leaves it returns too."""
    responses = [response for pair in pairs for response in pair]
    leaf = torch.cat(responses).to(dtype).detach().requires_grad_()
    sequence = torch.repeat_interleave(torch.tensor([len(r) for r in responses]))
    return leaf, *average_log_probs(leaf, sequence, len(responses))


def computed(objective, pairs, references, dtype):
    leaf, avg, counts = averages(pairs, dtype)
    reference = averages(references, dtype)[1].detach() if objective.needs_reference else None
    result = preference_loss(avg, counts, objective=objective, reference_avg_R=reference)
    return result, torch.autograd.grad(result.loss, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_the_published_formula(name, dtype):
    objective, formula = CASES[name]
    pairs = make_pairs(0)
    references = moved(pairs)
    leaves = [x.clone().requires_grad_() for pair in pairs for x in pair]
    twins = zip(leaves[0::2], leaves[1::2], references, strict=True)
    expected = sum(formula(winner, loser, *reference, objective) for winner, loser, reference in twins)
    # Eq. 5 of CPO and eq. 6 of ORPO: the mean over the chosen tokens of the batch, at the scale of a sum over pairs.
    likelihood = 1.0 if isinstance(objective, ORPOObjective) else objective.sft_weight
    chosen = torch.cat(leaves[0::2])
    of_sums = objective.sft_normalization == "sum"
    expected = expected - likelihood * (chosen.sum() if of_sums else len(pairs) * chosen.mean())
    expected_grad = torch.cat(torch.autograd.grad(expected, leaves))

    result, grad = computed(objective, pairs, references, dtype)
    budget = FP32 if dtype == torch.float32 else FP64
    assert abs(result.loss.item() - expected.item()) <= budget * abs(expected.item())
    assert (grad.double() - expected_grad).abs().max() <= budget * expected_grad.abs().max()
    assert result.num_pairs == 3


@pytest.mark.parametrize("name", ["cpo", "orpo", "ipo", "dpo"])
def test_every_objective_sums_the_same_metrics(name):
    objective, _ = CASES[name]
    pairs = make_pairs(1)
    result, _ = computed(objective, pairs, moved(pairs), torch.float64)
    sums = {key: value.item() for key, value in result.sums.items()}
    likelihood = {"sft_loss"} if name in ("cpo", "orpo") else set()
    assert sums.keys() - likelihood == {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "response_length/chosen", "response_length/rejected",
    }  # fmt: skip
    assert (likelihood <= sums.keys()) and not any(value.requires_grad for value in result.sums.values())
    assert sums["rewards/margins"] == pytest.approx(sums["rewards/chosen"] - sums["rewards/rejected"])
    assert sums["logps/chosen"] == pytest.approx(sum(float(c.mean()) for c, _ in pairs)), "nats per token, as SimPO's"
    assert sums["response_length/chosen"] == 34


def test_at_the_reference_itself_dpo_is_log_2_and_ipo_its_target_squared():
    pairs = make_pairs(2)
    result, _ = computed(DPOObjective(), pairs, pairs, torch.float32)
    assert result.loss.item() == pytest.approx(3 * math.log(2), rel=1e-7)
    assert result.sums["rewards/margins"].item() == 0.0
    result, _ = computed(IPOObjective(tau=0.1), pairs, pairs, torch.float32)
    assert result.loss.item() == pytest.approx(3 * 5.0**2, rel=1e-7)


def test_the_reference_gets_no_gradient_and_is_asked_for_by_name():
    _, avg, counts = averages(make_pairs(0), torch.float32)
    for objective in (DPOObjective(), IPOObjective()):
        with pytest.raises(ConfigError, match=f"reference_avg_R.*{objective.title}"):
            preference_loss(avg, counts, objective=objective)
    assert not CPOObjective().needs_reference and not ORPOObjective().needs_reference


def test_a_response_of_probability_one_leaves_orpo_finite():
    averages_R = torch.tensor([0.0, -1.0, -1.0, -0.0, -200.0, -1e-7], requires_grad=True)
    counts_R = torch.ones(6, dtype=torch.long)
    result = preference_loss(averages_R, counts_R, objective=ORPOObjective(odds_ratio_weight=1.0))
    (grad,) = torch.autograd.grad(result.loss, averages_R)
    assert result.loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (CPOObjective, {"beta": 0.0}),
        (CPOObjective, {"sft_weight": -1.0}),
        (DPOObjective, {"sft_weight": -1.0}),
        (DPOObjective, {"sft_normalization": "mean"}),
        (ORPOObjective, {"odds_ratio_weight": 0.0}),
        (IPOObjective, {"tau": 0.0}),
        (IPOObjective, {"tau": math.nan}),
        (DPOObjective, {"beta": -0.1}),
        (DPOObjective, {"beta": True}),
    ],
    ids=str,
)
def test_a_constant_outside_its_range_is_refused_by_name(objective, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        objective(**options)


def has_trl() -> bool:
    try:
        return importlib.util.find_spec("trl.experimental.cpo") is not None
    except ImportError:
        return False


needs_trl = pytest.mark.skipif(not has_trl(), reason="no trl with trl.experimental.cpo (0.29 or later)")


def trl_cpo(objective, chosen, rejected):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0, beta=objective.beta, label_smoothing=0.0, loss_type="sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    losses, *rewards = CPOTrainer.cpo_loss(trainer, chosen.sum_, rejected.sum_)
    return losses.sum(), rewards


def trl_orpo(objective, chosen, rejected):
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=objective.odds_ratio_weight, accelerator=SimpleNamespace(device="cpu"))
    losses, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, chosen.mean, rejected.mean)
    return -losses.sum(), rewards


def trl_dpo(objective, chosen, rejected):
    """DPOTrainer's own loss of rows of token log-probabilities that a model would have given."""
    from trl import DPOTrainer

    rows = [*chosen.rows, *rejected.rows]
    width = max(len(row) for row in rows)
    log_probs = torch.stack([F.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.tensor([[0] + [1] * len(row) + [0] * (width - len(row)) for row in rows])
    nothing = torch.zeros(len(rows), width)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", label_smoothing=0.0, use_weighting=False,
        loss_types=[objective.objective.replace("dpo", "sigmoid")], loss_weights=[1.0],
        beta=getattr(objective, "beta", getattr(objective, "tau", None)),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = dict(
        input_ids=mask, attention_mask=mask, completion_mask=mask,
        ref_chosen_logps=chosen.reference_sum, ref_rejected_logps=rejected.reference_sum,
    )  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    metrics = trainer._metrics["train"]
    return loss * len(chosen.rows), [torch.tensor(metrics[f"rewards/{key}"]) for key in ("chosen", "rejected")]


def side(rows, references):
    return SimpleNamespace(
        rows=rows,
        sum_=torch.stack([row.sum() for row in rows]),
        mean=torch.stack([row.mean() for row in rows]),
        reference_sum=torch.stack([row.sum() for row in references]).float(),
    )


@needs_trl
@pytest.mark.parametrize(
    ("objective", "trl"),
    [
        (CPOObjective(sft_weight=0.0), trl_cpo),
        (ORPOObjective(), trl_orpo),
        (IPOObjective(), trl_dpo),
        (DPOObjective(), trl_dpo),
    ],
    ids=lambda value: getattr(value, "title", ""),
)
def test_loss_gradient_and_rewards_are_those_of_trl(objective, trl):
    """The preference terms: TRL adds its likelihood elsewhere, in ORPO's case of the prompt as well."""
    pairs = make_pairs(3)
    references = moved(pairs)
    result, grad = computed(objective, pairs, references, torch.float32)
    leaves = [x.float().requires_grad_() for pair in pairs for x in pair]
    sides = [side(leaves[i::2], [pair[i] for pair in references]) for i in (0, 1)]
    expected, rewards = trl(objective, *sides)
    expected_grad = torch.cat(torch.autograd.grad(expected, leaves))
    loss = result.loss - result.sums.get("sft_loss", 0.0)
    if objective.sft_weight:
        _, counts = averages(pairs, torch.float32)[1:]
        chosen = torch.repeat_interleave(torch.arange(6) % 2 == 0, counts)
        grad = grad + len(pairs) / counts[0::2].sum() * chosen
    assert loss.item() == pytest.approx(expected.item(), rel=FP32)
    torch.testing.assert_close(grad, expected_grad, rtol=FP32, atol=FP32 * float(expected_grad.abs().max()))
    if not isinstance(objective, IPOObjective):  # whose rewards TRL takes of sums, though its loss is of averages
        for name, reward in zip(("chosen", "rejected"), rewards, strict=True):
            scale = 3 / len(reward)
            assert result.sums[f"rewards/{name}"].item() == pytest.approx(scale * reward.sum().item(), rel=FP32)
