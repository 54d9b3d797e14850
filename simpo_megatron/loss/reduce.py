"""From log-probabilities of tokens to one average per response.

Shapes: N response tokens, R responses.
"""

import torch
from torch import Tensor


def average_log_probs(logp_N: Tensor, sequence_N: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Returns the average log-probability of each response and its length.

    A response without tokens has average 0 and passes no gradient on: its count is clamped to one before the
    division, since a 0/0 masked afterwards would still turn the gradient into NaN. Sums are taken in float64,
    so that 8,192 tokens cost no more accuracy than one.

    Args:
        logp_N: fp32, natural log, nats.
        sequence_N: int64 in [0, num_sequences), the response of each token, on any device.
        num_sequences: the number of responses, R.

    Returns:
        averages [R] in the dtype of `logp_N`, nats per token; counts [R] int64, tokens.
    """
    sequence_N = sequence_N.to(logp_N.device, non_blocking=True)
    sums_R = logp_N.new_zeros(num_sequences, dtype=torch.float64).index_add(0, sequence_N, logp_N.double())
    counts_R = sequence_N.new_zeros(num_sequences).index_add_(0, sequence_N, torch.ones_like(sequence_N))
    return (sums_R / counts_R.clamp(min=1)).to(logp_N.dtype), counts_R
