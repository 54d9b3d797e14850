"""The forward step that megatron's pipeline schedules call, and the loss they call after the last stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simpo_megatron import faults
from simpo_megatron.loss import (
    PreferenceObjective,
    average_log_probs,
    monitored_sums,
    preference_loss,
)
from simpo_megatron.mcore.microbatch import Microbatch, output_of

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Any]]


class MicrobatchStep(ABC):
    """`forward_step(data_iterator, model)` of one pass: the model's output, and the function `loss` for it.

    Schedules call it once per microbatch and model chunk. Each chunk has its own iterator over the same microbatches.
    """

    def __call__(self, data_iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        microbatch = next(data_iterator)
        output = output_of(model, microbatch)

        def loss(log_probs_N: Tensor) -> tuple[Tensor, Tensor, Any]:
            return self.loss(log_probs_N, microbatch)

        return faults.at_gradient("backward", faults.at_value("forward", output)), loss

    @abstractmethod
    def loss(self, log_probs_N: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Any]:
        """(sum of the loss over pairs, pairs, results to keep), as schedules want with `calculate_per_token_loss`."""


class ResponseLogProbs(NamedTuple):
    """The responses of one microbatch, the chosen and the rejected one of each pair in turn."""

    avg_R: Tensor
    """fp32 [2 * pairs]: average log-probs, nats per token."""
    counts_R: Tensor
    """int64 [2 * pairs]: tokens that count."""


@dataclass(frozen=True)
class ForwardStep(MicrobatchStep):
    """The pass of a training step, which keeps the sums of the metrics."""

    objective: PreferenceObjective
    pairs_per_chosen_token: float
    """Pairs over chosen response tokens of the whole global batch; the weight of a token in the `token` SFT term."""

    def loss(self, log_probs_N: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of the loss over pairs, pairs, metric sums).

        The sums are new tensors: schedules scale the returned loss in place.
        """
        loss, sums = loss_and_sums(
            _of_responses(log_probs_N, microbatch),
            self.objective,
            microbatch.reference_avg_R,
            self.pairs_per_chosen_token,
        )
        return loss, _num_pairs(log_probs_N, microbatch), sums


class LogProbsStep(MicrobatchStep):
    """A pass without gradients that keeps the log-probs of the responses."""

    def loss(self, log_probs_N: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, ResponseLogProbs]:
        """(0, pairs, the log-probs of the responses)."""
        return log_probs_N.new_zeros(()), _num_pairs(log_probs_N, microbatch), _of_responses(log_probs_N, microbatch)


def loss_and_sums(
    responses: ResponseLogProbs,
    objective: PreferenceObjective,
    reference_avg_R: Tensor | None,
    pairs_per_chosen_token: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum of the loss over the pairs of a microbatch, the metric sums of the same)."""
    result = preference_loss(
        *responses,
        objective=objective,
        reference_avg_R=reference_avg_R,
        pairs_per_chosen_token=pairs_per_chosen_token,
    )
    return result.loss, result.sums | monitored_sums(result, responses.counts_R)


def _of_responses(log_probs_N: Tensor, microbatch: Microbatch) -> ResponseLogProbs:
    tokens, context = microbatch.response_tokens, microbatch.layout.context
    cp_group = None if context is None else context.group
    sequence_N = tokens.on(log_probs_N.device).sequence_N
    return ResponseLogProbs(*average_log_probs(log_probs_N, sequence_N, 2 * tokens.num_pairs, cp_group))


def _num_pairs(log_probs_N: Tensor, microbatch: Microbatch) -> Tensor:
    """The pairs of the microbatch, counted once among its context-parallel ranks, because megatron sums them."""
    context = microbatch.layout.context
    counts_here = context is None or context.group.rank() == 0
    num_pairs = microbatch.response_tokens.num_pairs if counts_here else 0
    # Filled on the device: copying a number there would make the host wait.
    return torch.full((), num_pairs, dtype=torch.int, device=log_probs_N.device)
