"""The forward step that megatron's pipeline schedules call, and the loss they call after the last stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simpo_megatron.loss import PreferenceObjective, average_log_probs, preference_loss
from simpo_megatron.mcore.batch import Microbatch

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class ForwardStep:
    """`forward_step(data_iterator, model)` of one step: model output, and the loss of that output.

    Schedules call it once a microbatch and model chunk; each chunk has an iterator of its own over the same
    microbatches.
    """

    objective: PreferenceObjective
    pairs_per_chosen_token: float
    """Pairs over chosen response tokens of the whole global batch; the weight of a token in the `token` SFT term."""

    def __call__(self, data_iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        microbatch = next(data_iterator)
        output = model(
            microbatch.tokens_BS,
            microbatch.position_ids_BS,
            None,
            packed_seq_params=microbatch.layout,
        )

        def loss(log_probs_N: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return self.loss(log_probs_N, microbatch)

        return output, loss

    def loss(self, log_probs_N: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of the loss over pairs, pairs, metric sums), as schedules take them with `calculate_per_token_loss`.

        The sums are tensors of their own: schedules scale the returned loss in place.
        """
        tokens = microbatch.layout.tokens
        result = preference_loss(
            *average_log_probs(log_probs_N, tokens.sequence_N, 2 * tokens.num_pairs),
            objective=self.objective,
            pairs_per_chosen_token=self.pairs_per_chosen_token,
        )
        num_pairs = torch.tensor(result.num_pairs, dtype=torch.int, device=log_probs_N.device)
        return result.loss, num_pairs, result.sums
