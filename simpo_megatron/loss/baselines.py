"""The objectives that SimPO is compared with, on the same pairs, model and trainer.

KTO is not among them: it learns from single responses labelled good or bad, not from pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from simpo_megatron.errors import require
from simpo_megatron.loss.objective import Comparison, PreferenceObjective, Responses, SftNormalization, log_sigmoid
from simpo_megatron.option_field import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CPOObjective(PreferenceObjective):
    """CPO (arXiv 2401.08417, eq. 3 and 5): DPO without its reference, and the likelihood of the chosen.

    The loss is `-logsigmoid(beta * (log pi(w) - log pi(l)))` with log-probabilities of whole responses. Added to it
    is `sft_weight` times the chosen's negative log-likelihood, averaged over tokens as in the authors' code.
    """

    title = "CPO"
    paper = "arXiv 2401.08417"

    objective: str = field(default="cpo", init=False)

    beta: float = option(0.1, "Scale of the rewards, > 0. The paper uses 0.1.")
    sft_weight: float = option(
        1.0, "Weight of the negative log-likelihood of the chosen responses, >= 0. The paper uses 1."
    )

    def compare(self, chosen: Responses, rejected: Responses) -> Comparison:
        return _log_sigmoid(self.beta * chosen.sum_P, self.beta * rejected.sum_P)

    def describe(self) -> str:
        return f"beta {self.beta:g}, sft_weight {self.sft_weight:g}"

    def _check(self) -> None:
        require(self.beta > 0, "beta", self.beta, "a number > 0")
        require(self.sft_weight >= 0, "sft_weight", self.sft_weight, "a number >= 0")


@dataclass(frozen=True, kw_only=True)
class ORPOObjective(PreferenceObjective):
    """ORPO (arXiv 2403.07691, eq. 6 and 7): the likelihood of the chosen, and the ratio of the odds.

    With p = exp(average log-probability) and odds = p / (1 - p), `-logsigmoid(log(odds(w) / odds(l)))` times
    `odds_ratio_weight`, plus the negative log-likelihood of the chosen, mean over tokens. Rewards are
    `odds_ratio_weight` times the average log-probability, which orders responses as the odds do.
    """

    title = "ORPO"
    paper = "arXiv 2403.07691"

    objective: str = field(default="orpo", init=False)

    odds_ratio_weight: float = option(
        0.1, "Weight of the odds ratio, > 0, the paper's lambda. The paper tries 0.1 to 1."
    )

    # Eq. 6 has the likelihood at weight one; lambda weighs the other term.
    sft_weight = 1.0

    def compare(self, chosen: Responses, rejected: Responses) -> Comparison:
        weight = self.odds_ratio_weight
        loss_P = -weight * log_sigmoid(_log_odds(chosen.avg_P) - _log_odds(rejected.avg_P))
        return Comparison(loss_P, weight * chosen.avg_P, weight * rejected.avg_P)

    def describe(self) -> str:
        return f"odds_ratio_weight {self.odds_ratio_weight:g}"

    def _check(self) -> None:
        require(self.odds_ratio_weight > 0, "odds_ratio_weight", self.odds_ratio_weight, "a number > 0")


@dataclass(frozen=True, kw_only=True)
class IPOObjective(PreferenceObjective):
    """IPO (arXiv 2310.12036, eq. 17): the distance of the log-ratio margin from a fixed one.

    `(h - 1 / (2 * tau))**2` for h = log(pi(w) / pi_ref(w)) - log(pi(l) / pi_ref(l)). Each log-ratio is per token:
    TRL's maintainers report from the authors that the paper's results are of this form. Rewards are tau times
    the log-ratio, so that the margin aimed at is 1/2.
    """

    title = "IPO"
    paper = "arXiv 2310.12036"
    needs_reference = True

    objective: str = field(default="ipo", init=False)

    tau: float = option(
        0.1,
        "Strength of the pull towards the reference, > 0; the target log-ratio margin is 1 / (2 tau) nats per token.",
    )

    @property
    def target_margin(self) -> float:
        return 0.5

    def compare(self, chosen: Responses, rejected: Responses) -> Comparison:
        h_P = chosen.avg_ratio_P - rejected.avg_ratio_P
        loss_P = (h_P - 1 / (2 * self.tau)).square()
        return Comparison(loss_P, self.tau * chosen.avg_ratio_P, self.tau * rejected.avg_ratio_P)

    def describe(self) -> str:
        return f"tau {self.tau:g}"

    def _check(self) -> None:
        require(self.tau > 0, "tau", self.tau, "a number > 0")


@dataclass(frozen=True, kw_only=True)
class DPOObjective(PreferenceObjective):
    """DPO (arXiv 2305.18290, eq. 7): `-logsigmoid` of the margin of rewards beta * log(pi(y) / pi_ref(y)).

    `sft_weight` times the negative log-likelihood of the chosen may be added, as RPO (arXiv 2404.19733) does.
    """

    title = "DPO"
    paper = "arXiv 2305.18290"
    needs_reference = True

    objective: str = field(default="dpo", init=False)

    beta: float = option(0.1, "Strength of the pull towards the reference, > 0. The paper uses 0.1 and 0.5.")
    sft_weight: float = option(0.0, "Weight of the negative log-likelihood of the chosen responses, >= 0.")
    sft_normalization: SftNormalization = option("token", "Mean of the SFT term: token, sequence or sum.")

    def compare(self, chosen: Responses, rejected: Responses) -> Comparison:
        return _log_sigmoid(self.beta * chosen.ratio_P, self.beta * rejected.ratio_P)

    def describe(self) -> str:
        return f"beta {self.beta:g}" + (f", sft_weight {self.sft_weight:g}" if self.sft_weight else "")

    def _check(self) -> None:
        require(self.beta > 0, "beta", self.beta, "a number > 0")
        require(self.sft_weight >= 0, "sft_weight", self.sft_weight, "a number >= 0")
        found, allowed = self.sft_normalization, get_args(SftNormalization)
        require(found in allowed, "sft_normalization", found, " or ".join(allowed))


def _log_sigmoid(chosen_reward_P: Tensor, rejected_reward_P: Tensor) -> Comparison:
    """The Bradley-Terry loss of rewards."""
    return Comparison(-log_sigmoid(chosen_reward_P - rejected_reward_P), chosen_reward_P, rejected_reward_P)


def _log_odds(avg_P: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(average); p is clamped just below 1, where the odds would be infinite."""
    from torch import finfo

    avg_P = avg_P.clamp(max=-finfo(avg_P.dtype).eps)
    return avg_P - (-avg_P.expm1()).log()
