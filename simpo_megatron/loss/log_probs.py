"""Log-probabilities of target tokens from logits that already exist, sliced over the vocabulary or whole.

Shapes: N tokens (any leading shape, flattened), v this rank's vocabulary slice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron.errors import ConfigError
from simpo_megatron.loss.tokens import IGNORE_INDEX, VocabShard, check_targets


def merge_shards(lse_N: Tensor, target_N: Tensor, tp_group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Returns the log-sum-exp and the target logit over the whole vocabulary, from each rank's slice.

    Args:
        lse_N: log-sum-exp over this rank's slice; -inf where the slice has nothing.
        target_N: the target's logit on the rank that holds it, -inf on the others. So a target that no rank
            holds gives -inf, not a plausible number.
        tp_group: the ranks that share the vocabulary; None or one rank needs no merging.

    Collectives: one all-gather of [2, N] over `tp_group`.
    """
    if tp_group is None or tp_group.size() == 1:
        return lse_N, target_N
    # stack() also makes it contiguous: gloo silently reads strided tensors wrongly.
    local_2N = torch.stack((lse_N, target_N))
    all_T2N = local_2N.new_empty(tp_group.size(), *local_2N.shape)
    dist.all_gather_into_tensor(all_T2N.flatten(0, 1), local_2N, group=tp_group)
    return torch.logsumexp(all_T2N[:, 0], 0), all_T2N[:, 1].amax(0)


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Returns log p(target), natural log, of every token: the shape of `targets`, fp32, replicated over tp.

    Ignored positions get 0 and pass no gradient. fp32 sums whatever the dtype (float64 stays float64);
    neither argument is modified.

    Args:
        logits: [..., v], any float dtype, this rank's vocabulary slice. Columns of ids >= `vocab_size` are
            padding and take no part.
        targets: [...], int64, replicated over tp. The target at t is the token predicted at t.
        tp_group: the ranks that share the vocabulary; None for a whole vocabulary without process group.
        vocab_start: the token id of this rank's first column.
        vocab_size: the number of real token ids.
        ignore_index: the target that marks a position without a token.

    Collectives: forward one all-gather of [2, N] over `tp_group`; backward none.

    Raises:
        ConfigError: shapes of logits and targets differ.
        DataError: a target is outside the vocabulary (on every rank).
    """
    if logits.shape[:-1] != targets.shape:
        raise ConfigError(
            f"targets: found shape {tuple(targets.shape)}, expected {tuple(logits.shape[:-1])}, that of the logits "
            "without their last dimension"
        )
    vocab = VocabShard(start=vocab_start, size=vocab_size)
    logits_Nv, targets_N = logits.flatten(0, -2), targets.flatten()
    counted_N = targets_N != ignore_index
    check_targets(targets_N[counted_N], vocab_size)
    logp_N = _LogProbs.apply(logits_Nv, targets_N, counted_N, vocab, tp_group)
    return logp_N.view(targets.shape)


class _LogProbs(torch.autograd.Function):
    """log p(target) of every row; saves the logits themselves and one log-sum-exp a row, no softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_Nv: Tensor,
        targets_N: Tensor,
        counted_N: Tensor,
        vocab: VocabShard,
        tp_group: ProcessGroup | None,
    ) -> Tensor:
        width = vocab.num_real(logits_Nv.shape[1])
        real_Nv = logits_Nv[:, :width].to(torch.promote_types(logits_Nv.dtype, torch.float32))
        column_N = targets_N - vocab.start
        own_N = (counted_N & (column_N >= 0) & (column_N < width)).nonzero()[:, 0]
        column_N = column_N[own_N]
        target_N = real_Nv.new_full(targets_N.shape, -torch.inf)
        target_N[own_N] = real_Nv[own_N, column_N]
        lse_N, target_N = merge_shards(torch.logsumexp(real_Nv, 1), target_N, tp_group)
        ctx.save_for_backward(logits_Nv, lse_N, counted_N, own_N, column_N)
        ctx.width = width
        return (target_N - lse_N).masked_fill_(~counted_N, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_Nv, lse_N, counted_N, own_N, column_N = ctx.saved_tensors
        grad_N = grad_N.masked_fill(~counted_N, 0)
        # An ignored row may hold anything, inf included: its gradient is 0 by replacement, not by 0 * inf.
        grad_Nv = torch.sub(logits_Nv[:, : ctx.width], lse_N[:, None]).exp_().mul_(-grad_N[:, None])
        grad_Nv.masked_fill_(~counted_N[:, None], 0)
        grad_Nv[own_N, column_N] += grad_N[own_N]
        padding = logits_Nv.shape[1] - ctx.width
        return torch.nn.functional.pad(grad_Nv, (0, padding)).to(logits_Nv.dtype), None, None, None, None
