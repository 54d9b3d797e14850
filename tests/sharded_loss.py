"""A small head whose vocabulary lies on one, two or three ranks in uneven slices, and its dense twin in float64."""

from __future__ import annotations

import torch
import torch.distributed as dist

from simpo_megatron.loss import ResponseTokens, VocabShard, fused_linear_log_probs

S, B, H = 6, 2, 4
ROWS = torch.tensor([1, 3, 3, 5, 8, 9, 10])
SEQUENCE = torch.tensor([0, 0, 1, 1, 2, 2, 3])
# Uneven slices by number of ranks; the last real id is SIZE - 1, the rest is padding.
SIZE = 16
CUTS = {1: [0, 18], 2: [0, 7, 18], 3: [0, 7, 12, 18]}
# The first and last id of every slice above, and of the vocabulary.
TARGETS = torch.tensor([0, 6, 7, 11, 12, 15, 7])
GROUPS: dict[int, dist.ProcessGroup] = {}


def groups():
    """The groups of one, two and three ranks this rank is in."""
    return [(size, group) for size, group in GROUPS.items() if dist.get_rank() < size]


class Shard(torch.autograd.Function):
    """A rank's part of a tensor every rank has whole; the whole gradient on every rank."""

    @staticmethod
    def forward(ctx, whole, dim, start, stop, group):
        ctx.where = whole.shape, dim, start, stop, group
        return whole.narrow(dim, start, stop - start).clone()

    @staticmethod
    def backward(ctx, grad):
        shape, dim, start, stop, group = ctx.where
        whole = grad.new_zeros(shape)
        whole.narrow(dim, start, stop - start).copy_(grad)
        dist.all_reduce(whole, group=group)
        return whole, None, None, None, None


def make(seed=0, dtype=torch.float64, padded=18):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(padded, H, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randn(len(ROWS), generator=generator, dtype=torch.float64)


def sharded_log_probs(hidden, weight, group, *, targets=TARGETS, cuts=None, sp=False, **options):
    """log p [N] from whole tensors that every rank has, computed from this rank's parts of them."""
    rank, size = group.rank(), group.size()
    start, stop = (cuts or CUTS[size])[rank : rank + 2]
    if sp:
        hidden = Shard.apply(hidden, 0, rank * S // size, (rank + 1) * S // size, group)
    return fused_linear_log_probs(
        hidden,
        Shard.apply(weight, 0, start, stop, group),
        ResponseTokens(ROWS, targets, SEQUENCE, 2),
        vocab=VocabShard(start=start, size=SIZE),
        tp_group=group,
        sequence_parallel=sp,
        **options,
    )


def dense_log_probs(hidden, weight, targets=TARGETS, rows=ROWS):
    return (hidden.flatten(0, 1)[rows] @ weight[:SIZE].t()).log_softmax(-1)[torch.arange(len(rows)), targets]


def values_and_gradients(function, hidden, weight, slope):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logp = function(hidden, weight)
    return logp.detach(), *torch.autograd.grad((logp * slope.to(logp.dtype)).sum(), (hidden, weight))


def assert_close(got, want, tolerance=1e-13):
    for one, other in zip(got, want):
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"relative error {error}"
