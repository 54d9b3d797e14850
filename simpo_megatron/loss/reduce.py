"""From log-probabilities of tokens to one average per response.

Shapes: N response tokens, R responses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def average_log_probs(
    logp_N: Tensor, sequence_N: Tensor, num_sequences: int, cp_group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the average log-probability of each response and its length.

    A response without tokens has average 0 and passes no gradient on. Its count is clamped to one before the
    division: a 0/0 masked afterwards would still turn the gradient into NaN. Sums are in float64, so that 8,192
    tokens are as accurate as one. Their order is fixed on every device (index_put; index_add on a GPU has none).

    Args:
        logp_N: fp32, natural log, nats.
        sequence_N: int64 in [0, num_sequences), the response of each token, on any device.
        num_sequences: the number of responses, R.
        cp_group: the ranks that share every sequence, of which each has its own tokens, or none; None without
            context parallelism.

    Returns:
        averages [R] in the dtype of `logp_N`, nats per token; counts [R] int64, tokens; replicated over cp.

    Collectives: under context parallelism one all-reduce of [2, R] float64 over `cp_group`. The backward has none:
    all its ranks compute the same loss, and each passes on the gradient of its own tokens.
    """
    sequence_N = sequence_N.to(logp_N.device, non_blocking=True)
    zeros_R = logp_N.new_zeros(num_sequences, dtype=torch.float64)
    sums_R = zeros_R.index_put((sequence_N,), logp_N.double(), accumulate=True)
    counts_R = sequence_N.new_zeros(num_sequences).index_add_(0, sequence_N, torch.ones_like(sequence_N))
    if cp_group is not None and cp_group.size() > 1:
        sums_R, counts = _SumOverRanks.apply(torch.stack((sums_R, counts_R.double())), cp_group).unbind(0)
        counts_R = counts.long()
    return (sums_R / counts_R.clamp(min=1)).to(logp_N.dtype), counts_R


class _SumOverRanks(torch.autograd.Function):
    """The sum over a group whose ranks all compute the same loss from it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:
        total = own.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
