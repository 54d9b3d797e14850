"""Two ranks on one GPU over gloo, each with half of the vocabulary, against one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from simpo_megatron.gpu_check.timing import relative_error
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict
from simpo_megatron.loss import ResponseTokens, VocabShard, fused_linear_log_probs

BUDGET = 1e-5
"""Relative error in fp32. A GPU adds 8,000 columns one at a time: 2^-24 times their root, on either side."""


def check_two_ranks(setting: CheckSetting) -> Verdict:
    """Checks log-probs and both gradients of two tensor-parallel ranks against one rank."""
    path = str(setting.folder / "two_ranks.pt")
    expected = _loss(setting, None, 0, 1)
    multiprocessing.spawn(_rank, args=(setting, path), nprocs=2)
    parts = [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(2)]
    found = parts[0]["logp"], parts[0]["dH"], torch.cat([part["dW"] for part in parts])
    errors = {
        name: relative_error(mine, one.cpu())
        for name, mine, one in zip(("logp", "dH", "dW"), found, expected, strict=True)
    }
    value = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    return Verdict.of(max(errors.values()) <= BUDGET, value, f"{BUDGET:g}")


def _rank(rank: int, setting: CheckSetting, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    logp, hidden_grad, weight_grad = _loss(setting, dist.group.WORLD, rank, 2)
    torch.save({"logp": logp.cpu(), "dH": hidden_grad.cpu(), "dW": weight_grad.cpu()}, f"{path}.{rank}")
    dist.destroy_process_group()


def _loss(
    setting: CheckSetting, group: dist.ProcessGroup | None, rank: int, num_ranks: int
) -> tuple[torch.Tensor, ...]:
    length, hidden_size, vocab = setting.size(600, 20), setting.size(512, 16), setting.size(8000, 302)
    random = torch.Generator().manual_seed(2)
    rows = torch.randint(0, length, (setting.size(400, 12),), generator=random).sort().values
    targets = torch.randint(0, vocab, (len(rows),), generator=random)
    hidden = torch.randn(length, 1, hidden_size, generator=random).to(setting.device).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=random) * hidden_size**-0.5
    start = rank * vocab // num_ranks
    part = weight[start : start + vocab // num_ranks].to(setting.device).requires_grad_()
    tokens = ResponseTokens(rows, targets, torch.zeros(len(rows), dtype=torch.int64), num_pairs=1)
    logp = fused_linear_log_probs(hidden, part, tokens, vocab=VocabShard(start=start, size=vocab), tp_group=group)
    logp.sum().backward()
    assert hidden.grad is not None and part.grad is not None
    return logp.detach(), hidden.grad, part.grad
