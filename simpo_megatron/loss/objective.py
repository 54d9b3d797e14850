"""The interface of every objective: average log-probabilities of pairs in, the loss and its metrics out.

Shapes: P pairs, R responses (R = 2P, chosen and rejected in turn).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from math import isfinite
from typing import TYPE_CHECKING, ClassVar, Literal

from simpo_megatron.errors import require

if TYPE_CHECKING:
    # An objective's options are read, and wrong ones refused, before torch is imported.
    from torch import Tensor

SftNormalization = Literal["token", "sequence", "sum"]


@dataclass(frozen=True)
class Responses:
    """The chosen, or the rejected, responses of P pairs: the input of an objective.

    avg_P: fp32, average log-probability log pi(y|x) / |y|, nats per token.
    count_P: |y|, tokens, in the dtype of `avg_P`.
    reference_avg_P: the same average under the reference model; None where there is none.
    """

    avg_P: Tensor
    count_P: Tensor
    reference_avg_P: Tensor | None = None

    @property
    def sum_P(self) -> Tensor:
        """log pi(y|x), nats."""
        return self.avg_P * self.count_P

    @property
    def avg_ratio_P(self) -> Tensor:
        """log(pi(y|x) / pi_ref(y|x)) / |y|, nats per token."""
        assert self.reference_avg_P is not None, "preference_loss requires a reference where an objective needs one"
        return self.avg_P - self.reference_avg_P

    @property
    def ratio_P(self) -> Tensor:
        """log(pi(y|x) / pi_ref(y|x)), nats."""
        return self.avg_ratio_P * self.count_P


@dataclass(frozen=True)
class Comparison:
    """An objective's loss of each of P pairs, with gradient, and the rewards of its responses."""

    loss_P: Tensor
    chosen_reward_P: Tensor
    rejected_reward_P: Tensor


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective(ABC):
    """A published objective: a subclass holds its constants and compares pairs with them.

    Raises ConfigError for a constant outside its range.
    """

    title: ClassVar[str]
    """Its name as its authors write it."""
    paper: ClassVar[str]
    """The publication."""
    needs_reference: ClassVar[bool] = False
    """True where it needs log-probabilities under the model that training started from."""

    # A subclass that adds the log-likelihood of chosen responses overrides these, as options or as constants.
    sft_weight = 0.0
    sft_normalization = "token"

    @property
    def target_margin(self) -> float | None:
        """The reward margin that the loss aims at; None where a larger one is always better."""
        return None

    @abstractmethod
    def compare(self, chosen: Responses, rejected: Responses) -> Comparison:
        """The loss of each pair, the SFT term apart, and its rewards."""

    @abstractmethod
    def describe(self) -> str:
        """The constants, as a line of a report."""

    @abstractmethod
    def _check(self) -> None:
        """Raises ConfigError when a constant is outside its range."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "float":
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                require(is_number and isfinite(value), entry.name, value, "a finite number")
        self._check()


def log_sigmoid(x_P: Tensor) -> Tensor:
    """The logarithm of the logistic function of `x_P`, elementwise; the gradient is torch's own."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x_P)


@dataclass(frozen=True)
class PreferenceResult:
    """The loss of one microbatch and the sums a trainer adds up over microbatches and ranks.

    loss: 0-dim, with gradient, the sum over the microbatch's pairs; divide by the pairs of the global batch.
    num_pairs: the pairs of the microbatch.
    sums: 0-dim detached tensors, each the sum over pairs of the metric it is named for.
    chosen_avg_P, rejected_avg_P: detached average log-probabilities, nats per token.
    preference_loss_P: detached, the loss of each pair, the SFT term apart.
    """

    loss: Tensor
    num_pairs: int
    sums: dict[str, Tensor]
    chosen_avg_P: Tensor
    rejected_avg_P: Tensor
    preference_loss_P: Tensor


def preference_loss(
    avg_R: Tensor,
    counts_R: Tensor,
    *,
    objective: PreferenceObjective,
    reference_avg_R: Tensor | None = None,
    pairs_per_chosen_token: float | None = None,
) -> PreferenceResult:
    """Returns the loss summed over pairs, and the sums of its metrics, which every objective shares.

    Args:
        avg_R: fp32, average log-probability of each response, nats per token, chosen and rejected in turn;
            replicated over tp.
        counts_R: int64, the tokens of each response.
        objective: the objective and its constants.
        reference_avg_R: what `avg_R` was under the reference model, for an objective that needs one.
        pairs_per_chosen_token: pairs divided by chosen tokens, both of the global batch. With it the sft term
            with `token` normalisation is the mean over the global batch's chosen tokens, however the batch is
            split into microbatches. None: these pairs are the batch.

    Collectives: none.

    Raises:
        ConfigError: the objective needs a reference and none was given.
    """
    require(
        reference_avg_R is not None or not objective.needs_reference,
        "reference_avg_R",
        None,
        f"the reference model's average log-probabilities: {objective.title} needs them",
    )
    chosen, rejected = _responses(avg_R, counts_R, reference_avg_R)
    compared = objective.compare(chosen, rejected)
    loss_P, margin_P = compared.loss_P, compared.chosen_reward_P - compared.rejected_reward_P

    sums = {}
    if objective.sft_weight > 0:
        sft_P = -chosen.sum_P if objective.sft_normalization == "sum" else -chosen.avg_P
        if objective.sft_normalization == "token":
            weight: float | Tensor | None = pairs_per_chosen_token
            if weight is None:
                weight = margin_P.numel() / chosen.count_P.sum().clamp(min=1)
            sft_P = sft_P * chosen.count_P * weight
        loss_P = loss_P + objective.sft_weight * sft_P
        sums["sft_loss"] = sft_P.detach().sum()

    sums |= {
        # A new tensor: megatron's schedules divide the returned loss in place.
        "loss": loss_P.detach().sum(),
        "rewards/chosen": compared.chosen_reward_P.detach().sum(),
        "rewards/rejected": compared.rejected_reward_P.detach().sum(),
        "rewards/margins": margin_P.detach().sum(),
        "rewards/accuracies": (margin_P > 0).to(avg_R.dtype).sum(),
        "logps/chosen": chosen.avg_P.detach().sum(),
        "logps/rejected": rejected.avg_P.detach().sum(),
        "response_length/chosen": chosen.count_P.sum(),
        "response_length/rejected": rejected.count_P.sum(),
    }
    detached = (tensor_P.detach() for tensor_P in (chosen.avg_P, rejected.avg_P, compared.loss_P))
    return PreferenceResult(loss_P.sum(), margin_P.numel(), sums, *detached)


def _responses(avg_R: Tensor, counts_R: Tensor, reference_avg_R: Tensor | None) -> tuple[Responses, Responses]:
    """(chosen, rejected) of responses in turn."""
    avgs, counts = avg_R.view(-1, 2).unbind(1), counts_R.to(avg_R.dtype).view(-1, 2).unbind(1)
    references: tuple[Tensor | None, ...] = (None, None)
    if reference_avg_R is not None:
        references = reference_avg_R.to(avg_R.dtype).view(-1, 2).unbind(1)
    chosen, rejected = (Responses(*parts) for parts in zip(avgs, counts, references, strict=True))
    return chosen, rejected
