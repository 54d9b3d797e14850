"""The objective: from average log-probabilities of pairs to the loss and what is logged of it.

Shapes: P pairs, R responses (R = 2P, chosen and rejected in turn).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from simpo_megatron.errors import ConfigError

LOSS_TYPES = ("sigmoid", "hinge")
SFT_NORMALIZATIONS = ("token", "sequence")


@dataclass(frozen=True, kw_only=True)
class SimPOObjective:
    """What is optimised: SimPO (arXiv 2405.14734, eq. 6) and its published variants.

    For a pair with average log-probabilities `w` (chosen) and `l` (rejected), `z = beta * (w - l) - gamma`
    and the loss is `-logsigmoid(z)`. Raises ConfigError for a value outside its range.
    """

    beta: float = 2.0
    """Scale of the rewards, > 0. The paper uses 2.0 to 10."""

    gamma_beta_ratio: float = 0.5
    """Target reward margin divided by beta, >= 0, in nats per token. The paper uses 0.1 to 0.8."""

    loss_type: str = "sigmoid"
    """`sigmoid` for -logsigmoid(z), `hinge` for relu(1 - z)."""

    label_smoothing: float = 0.0
    """Probability in [0, 0.5) that a pair's preference is wrong; for `sigmoid` only."""

    sft_weight: float = 0.0
    """Weight of the negative log-likelihood of the chosen responses, >= 0. The paper uses 0."""

    sft_normalization: str = "token"
    """`token`: mean over all chosen tokens of the global batch; `sequence`: mean over responses of their
    means."""

    alpha: float = 0.0
    """AlphaPO's reward shape (arXiv 2501.03884): r = (1 - p**-alpha) / alpha for p = exp(average
    log-probability); 0 is SimPO itself."""

    @property
    def gamma(self) -> float:
        """The target reward margin in units of reward."""
        return self.beta * self.gamma_beta_ratio

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and (isinstance(value, bool) or not isinstance(value, (int, float))
                                          or not isfinite(value)):
                raise ConfigError(f"{field.name}: found {value!r}; expected a finite number")
        _require(self.beta > 0, "beta", self.beta, "a number > 0")
        _require(self.gamma_beta_ratio >= 0, "gamma_beta_ratio", self.gamma_beta_ratio, "a number >= 0")
        _require(self.loss_type in LOSS_TYPES, "loss_type", self.loss_type, " or ".join(LOSS_TYPES))
        _require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "in [0, 0.5)")
        _require(
            self.label_smoothing == 0 or self.loss_type == "sigmoid",
            "label_smoothing", self.label_smoothing, "0 with loss_type hinge, which has no smoothed form",
        )
        _require(self.sft_weight >= 0, "sft_weight", self.sft_weight, "a number >= 0")
        _require(
            self.sft_normalization in SFT_NORMALIZATIONS,
            "sft_normalization", self.sft_normalization, " or ".join(SFT_NORMALIZATIONS),
        )


def _require(holds: bool, key: str, found: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: found {found!r}; expected {expected}")


@dataclass(frozen=True)
class SimPOResult:
    """The loss of one microbatch and the sums a trainer adds up over microbatches and ranks.

    loss: 0-dim, with gradient, the sum over the microbatch's pairs; divide by the pairs of the global batch.
    num_pairs: the pairs of the microbatch.
    sums: 0-dim detached tensors, each the sum over pairs of the metric it is named for.
    chosen_avg_P, rejected_avg_P: detached average log-probabilities, nats per token.
    """

    loss: Tensor
    num_pairs: int
    sums: dict[str, Tensor]
    chosen_avg_P: Tensor
    rejected_avg_P: Tensor


def simpo_loss(
    avg_R: Tensor,
    counts_R: Tensor,
    *,
    objective: SimPOObjective,
    pairs_per_chosen_token: float | None = None,
) -> SimPOResult:
    """Returns the SimPO loss summed over pairs, and the sums of its metrics.

    Args:
        avg_R: fp32, average log-probability of each response, nats per token, chosen and rejected in turn;
            replicated over tp.
        counts_R: int64, the tokens of each response.
        objective: the objective and its constants.
        pairs_per_chosen_token: pairs divided by chosen tokens, both of the global batch. With it the sft term
            with `token` normalisation, summed over microbatches and divided by the global pairs, is the mean
            over the global batch's chosen tokens however the batch was cut. None: these pairs are the batch.

    Collectives: none.

    Source: arXiv 2405.14734 eq. 6; AlphaPO arXiv 2501.03884.
    """
    chosen_avg_P, rejected_avg_P = avg_R.view(-1, 2).unbind(1)
    chosen_count_P, rejected_count_P = counts_R.to(avg_R.dtype).view(-1, 2).unbind(1)
    chosen_reward_P = objective.beta * _shaped(chosen_avg_P, objective.alpha)
    rejected_reward_P = objective.beta * _shaped(rejected_avg_P, objective.alpha)
    margin_P = chosen_reward_P - rejected_reward_P
    loss_P = _preference_loss(margin_P - objective.gamma, objective)

    sums = {}
    if objective.sft_weight > 0:
        sft_P = -chosen_avg_P
        if objective.sft_normalization == "token":
            if pairs_per_chosen_token is None:
                pairs_per_chosen_token = chosen_count_P.numel() / chosen_count_P.sum().clamp(min=1)
            sft_P = sft_P * chosen_count_P * pairs_per_chosen_token
        loss_P = loss_P + objective.sft_weight * sft_P
        sums["sft_loss"] = sft_P.detach().sum()

    sums |= {
        # A tensor of its own: megatron's schedules divide the returned loss in place.
        "loss": loss_P.detach().sum(),
        "rewards/chosen": chosen_reward_P.detach().sum(),
        "rewards/rejected": rejected_reward_P.detach().sum(),
        "rewards/margins": margin_P.detach().sum(),
        "rewards/accuracies": (margin_P > 0).to(avg_R.dtype).sum(),
        "logps/chosen": chosen_avg_P.detach().sum(),
        "logps/rejected": rejected_avg_P.detach().sum(),
        "response_length/chosen": chosen_count_P.sum(),
        "response_length/rejected": rejected_count_P.sum(),
    }
    return SimPOResult(loss_P.sum(), margin_P.numel(), sums, chosen_avg_P.detach(), rejected_avg_P.detach())


def _shaped(avg_P: Tensor, alpha: float) -> Tensor:
    """AlphaPO's reward of an average log-probability; the log-probability itself at alpha 0, its limit."""
    return avg_P if alpha == 0 else -torch.expm1(-alpha * avg_P) / alpha


def _preference_loss(z_P: Tensor, objective: SimPOObjective) -> Tensor:
    if objective.loss_type == "hinge":
        return F.relu(1 - z_P)
    eps = objective.label_smoothing
    return -(1 - eps) * F.logsigmoid(z_P) - eps * F.logsigmoid(-z_P)
