"""Sums for the training monitors: signs of drift that SimPO, having no reference model, would not notice.

Shapes: P pairs, R responses (R = 2P).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from simpo_megatron.loss.objective import PreferenceResult

SATURATED_LOSS = 0.01
"""Below this `-logsigmoid(z)` has less than a hundredth of its largest gradient left."""
MONITORED = (
    "rewards/saturated",
    "_length",
    "_length_squared",
    "_log_prob",
    "_log_prob_squared",
    "_log_prob_times_length",
)


def monitored_sums(result: PreferenceResult, counts_R: Tensor) -> dict[str, Tensor]:
    """The `MONITORED` sums of a microbatch: 0-dim, float64; over pairs for `rewards/saturated`, else over responses.

    Args:
        result: of these pairs.
        counts_R: int64, the tokens of each response, chosen and rejected in turn.

    Collectives: none.
    """
    log_prob_R = torch.stack((result.chosen_avg_P, result.rejected_avg_P), dim=1).flatten().double()
    length_R = counts_R.double()
    values = (
        (result.preference_loss_P < SATURATED_LOSS).double(),
        length_R,
        length_R.square(),
        log_prob_R,
        log_prob_R.square(),
        log_prob_R * length_R,
    )
    return {name: value.sum() for name, value in zip(MONITORED, values, strict=True)}


def length_correlation(sums: Mapping[str, float], num_responses: int) -> float | None:
    """Pearson's correlation of the average log-prob of `num_responses` responses with their lengths, from their sums.

    The average log-prob is SimPO's reward, beta apart. None where either is the same for all.
    """
    length, length_squared, log_prob, log_prob_squared, product = (sums[name] / num_responses for name in MONITORED[1:])
    variances = (length_squared - length**2) * (log_prob_squared - log_prob**2)
    # Equal numbers can leave a rounding error as their variance; a NaN fails the comparison.
    if not variances > 1e-20 * length_squared * log_prob_squared:
        return None
    return (product - length * log_prob) / math.sqrt(variances)
