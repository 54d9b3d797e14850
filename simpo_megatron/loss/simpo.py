"""SimPO and its published variants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from simpo_megatron.errors import require
from simpo_megatron.loss.objective import Comparison, PreferenceObjective, Responses, SftNormalization, log_sigmoid
from simpo_megatron.option_field import option

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal["sigmoid", "hinge"]
LengthNormalization = Literal["mean", "none"]


@dataclass(frozen=True, kw_only=True)
class SimPOObjective(PreferenceObjective):
    """SimPO (arXiv 2405.14734, eq. 6) and its published variants.

    For a pair with average log-probabilities `w` (chosen) and `l` (rejected), `z = beta * (w - l) - gamma`
    and the loss is `-logsigmoid(z)`. Raises ConfigError for a value outside its range.
    """

    title = "SimPO"
    paper = "arXiv 2405.14734"

    objective: str = field(default="simpo", init=False)

    beta: float = option(2.0, "Scale of the rewards, > 0. The paper uses 2.0 to 10.", everyday=True)
    gamma_beta_ratio: float = option(
        0.5,
        "Target reward margin divided by beta, >= 0. In nats per token; the paper uses 0.1 to 0.8.",
        everyday=True,
    )
    loss_type: LossType = option("sigmoid", "Loss of z: sigmoid is -logsigmoid(z), hinge is relu(1 - z).")
    label_smoothing: float = option(
        0.0, "Probability in [0, 0.5) that a pair's preference is wrong; with loss_type sigmoid only."
    )
    sft_weight: float = option(
        0.0, "Weight of the negative log-likelihood of the chosen responses, >= 0. The paper uses 0."
    )
    sft_normalization: SftNormalization = option(
        "token",
        "Mean of the SFT term: token is over all chosen tokens of the global batch, sequence is over responses of "
        "their means, sum is over responses of their sums.",
    )
    alpha: float = option(
        0.0,
        "Reward shape of AlphaPO (arXiv 2501.03884): r = (1 - p**-alpha) / alpha for p = exp(average "
        "log-probability). 0 is SimPO itself.",
    )
    length_normalization: LengthNormalization = option(
        "mean",
        "Log-probability that the reward is beta times: mean is over the tokens of a response, none is their sum, the "
        "paper's ablation, for which beta is smaller by a response's length.",
    )

    @property
    def gamma(self) -> float:
        """The target reward margin in units of reward."""
        return self.beta * self.gamma_beta_ratio

    @property
    def target_margin(self) -> float:
        return self.gamma

    def compare(self, chosen: Responses, rejected: Responses) -> Comparison:
        chosen_reward_P, rejected_reward_P = self._reward(chosen), self._reward(rejected)
        loss_P = self._loss(chosen_reward_P - rejected_reward_P - self.gamma)
        return Comparison(loss_P, chosen_reward_P, rejected_reward_P)

    def describe(self) -> str:
        ratio = f"gamma_beta_ratio {self.gamma_beta_ratio:g}"
        sums = ", rewards of summed log-probs" if self.length_normalization == "none" else ""
        return f"{self.loss_type}, beta {self.beta:g}, gamma {self.gamma:g} ({ratio}){sums}"

    def _reward(self, responses: Responses) -> Tensor:
        return self.beta * (responses.sum_P if self.length_normalization == "none" else self._shaped(responses.avg_P))

    def _shaped(self, avg_P: Tensor) -> Tensor:
        """AlphaPO's reward of an average log-probability; the log-probability itself at alpha 0, its limit."""
        return avg_P if self.alpha == 0 else -(-self.alpha * avg_P).expm1() / self.alpha

    def _loss(self, z_P: Tensor) -> Tensor:
        if self.loss_type == "hinge":
            return (1 - z_P).relu()
        eps = self.label_smoothing
        return -(1 - eps) * log_sigmoid(z_P) - eps * log_sigmoid(-z_P)

    def _check(self) -> None:
        require(self.beta > 0, "beta", self.beta, "a number > 0")
        require(self.gamma_beta_ratio >= 0, "gamma_beta_ratio", self.gamma_beta_ratio, "a number >= 0")
        choices = {
            "loss_type": LossType,
            "sft_normalization": SftNormalization,
            "length_normalization": LengthNormalization,
        }
        for key, choice in choices.items():
            found, allowed = getattr(self, key), get_args(choice)
            require(found in allowed, key, found, " or ".join(allowed))
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "in [0, 0.5)")
        require(
            self.label_smoothing == 0 or self.loss_type == "sigmoid",
            "label_smoothing",
            self.label_smoothing,
            "0 with loss_type hinge, which has no smoothed form",
        )
        require(self.sft_weight >= 0, "sft_weight", self.sft_weight, "a number >= 0")
        is_mean = self.length_normalization == "mean"
        require(is_mean or self.alpha == 0, "alpha", self.alpha, "0 with length_normalization none")
