"""The forward step that megatron's pipeline schedules call, and the loss they call after the last stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpo_megatron import faults
from simpo_megatron.loss import (
    PreferenceObjective,
    average_log_probs,
    monitored_sums,
    preference_loss,
)
from simpo_megatron.mcore.batch import Microbatch

AVERAGES = "_averages"

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Any]]


class MicrobatchStep(ABC):
    """`forward_step(data_iterator, model)` of one pass: the model's output, and the function `loss` for it.

    Schedules call it once per microbatch and model chunk. Each chunk has its own iterator over the same microbatches.
    """

    def __call__(self, data_iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        microbatch = next(data_iterator)
        output = model(
            microbatch.tokens_BS,
            microbatch.position_ids_BS,
            None,
            labels=microbatch.labels,
            packed_seq_params=microbatch.layout,
        )

        def loss(log_probs_N: Tensor) -> tuple[Tensor, Tensor, Any]:
            return self.loss(log_probs_N, microbatch)

        return faults.at_gradient("backward", faults.at_value("forward", output)), loss

    @abstractmethod
    def loss(self, log_probs_N: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Any]:
        """(sum of the loss over pairs, pairs, results to keep), as schedules want with `calculate_per_token_loss`."""


@dataclass(frozen=True)
class ForwardStep(MicrobatchStep):
    """The pass of a training or evaluation step, which keeps the sums of the metrics."""

    objective: PreferenceObjective
    pairs_per_chosen_token: float
    """Pairs over chosen response tokens of the whole global batch; the weight of a token in the `token` SFT term."""
    keeps_averages: bool = False
    """Keep the average log-prob of every response as well, [2 * pairs] under AVERAGES."""

    def loss(self, log_probs_N: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of the loss over pairs, pairs, metric sums).

        The sums are new tensors: schedules scale the returned loss in place.
        """
        avg_R, counts_R = _averages(log_probs_N, microbatch)
        result = preference_loss(
            avg_R,
            counts_R,
            objective=self.objective,
            reference_avg_R=microbatch.reference_avg_R,
            pairs_per_chosen_token=self.pairs_per_chosen_token,
        )
        kept = result.sums | monitored_sums(result, counts_R)
        if self.keeps_averages:
            kept[AVERAGES] = avg_R.detach()
        return result.loss, _num_pairs(log_probs_N, microbatch), kept


class AverageLogProbs(MicrobatchStep):
    """A pass without gradients that keeps the average log-prob of every response."""

    def loss(self, log_probs_N: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
        """(0, pairs, averages [2 * pairs], nats per token)."""
        averages_R, _ = _averages(log_probs_N, microbatch)
        return log_probs_N.new_zeros(()), _num_pairs(log_probs_N, microbatch), averages_R


def _averages(log_probs_N: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """(average log-prob, tokens) of each response of the microbatch."""
    tokens, context = microbatch.response_tokens, microbatch.layout.context
    cp_group = None if context is None else context.group
    sequence_N = tokens.on(log_probs_N.device).sequence_N
    return average_log_probs(log_probs_N, sequence_N, 2 * tokens.num_pairs, cp_group)


def _num_pairs(log_probs_N: Tensor, microbatch: Microbatch) -> Tensor:
    """The pairs of the microbatch, counted once among its context-parallel ranks, because megatron sums them."""
    context = microbatch.layout.context
    counts_here = context is None or context.group.rank() == 0
    num_pairs = microbatch.response_tokens.num_pairs if counts_here else 0
    # Filled on the device: copying a number there would make the host wait.
    return torch.full((), num_pairs, dtype=torch.int, device=log_probs_N.device)
