"""Time and memory of the loss on the device, beside its three products and beside its peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from simpo_megatron.gpu_check.timing import median_seconds, peak_bytes
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict
from simpo_megatron.loss import (
    ResponseTokens,
    SimPOObjective,
    VocabShard,
    average_log_probs,
    fused_linear_log_probs,
    preference_loss,
)

FLOOR_BUDGET, TRL_BUDGET = 1.15, 0.4
_BETA, _GAMMA = 2.0, 1.0
# Hidden size and columns of the vocabulary on a rank. Half of the positions of a batch are prompt.
_SHAPES = {"70B tp8": (8192, 16_032), "8B tp1": (4096, 128_256), "1B tp1": (2048, 128_256)}
_TINY = {"tiny": (16, 300)}
_Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of hidden states [R, S, H] and the head, with the labels that it was made for."""


def measure_loss(setting: CheckSetting) -> Verdict:
    """Ours within 1.15 of its three products, and 0.4 of TRL's time, at three shapes."""
    ratios: dict[str, float] = {}
    details: dict[str, dict[str, float]] = {}
    for name, (hidden_size, width) in (_TINY if setting.rehearse else _SHAPES).items():
        found = details[name] = _measure_shape(hidden_size, width, setting)
        ratios[f"{name} of the products"] = found["ours ms"] / found["products ms"]
        ratios[f"{name} of TRL"] = found["ours ms"] / found["TRL ms"]
    value = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    budget = f"{FLOOR_BUDGET} of the products, {TRL_BUDGET} of TRL's"
    fast = all(ratio <= (FLOOR_BUDGET if "products" in name else TRL_BUDGET) for name, ratio in ratios.items())
    return Verdict.of(fast or setting.rehearse, value, "not judged" if setting.rehearse else budget, shapes=details)


def _measure_shape(hidden_size: int, width: int, setting: CheckSetting) -> dict[str, float]:
    num_rows, length = setting.size(8, 4), setting.size(1024, 16)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, length, hidden_size, generator=random).to(setting.device, torch.bfloat16)
    weight = (torch.randn(width, hidden_size, generator=random) * hidden_size**-0.5).to(setting.device, torch.bfloat16)
    labels = torch.randint(0, width, (num_rows, length), generator=random)
    labels[:, : length // 2] = -100
    leaves = hidden.requires_grad_(), torch.nn.Parameter(weight)
    found = {"products ms": 1e3 * median_seconds(partial(_products, *leaves, labels), setting)}
    for name, loss in _losses(labels, setting).items():
        work = partial(_forward_backward, loss, *leaves)
        try:
            found[f"{name} ms"] = 1e3 * median_seconds(work, setting)
            found[f"{name} MiB"] = peak_bytes(work, setting) / 2**20
        except torch.OutOfMemoryError:
            found[f"{name} ms"] = float("inf")
    return found


def _products(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The three products over the response rows, each in one call: what no loss can do without."""
    with torch.no_grad():
        rows = hidden.flatten(0, 1)[: int((labels >= 0).sum())]
        logits = rows @ weight.t()
        logits @ weight
        logits.t() @ rows


def _forward_backward(loss: _Loss, hidden: Tensor, weight: Tensor) -> None:
    hidden.grad = weight.grad = None
    loss(hidden, weight).backward()


def _losses(labels: Tensor, setting: CheckSetting) -> dict[str, _Loss]:
    tokens = ResponseTokens.from_labels(labels)
    here = (x.to(setting.device) for x in (tokens.rows_N, tokens.targets_N, tokens.sequence_N))
    tokens, labels = tokens.with_copy(*here), labels.to(setting.device)
    losses: dict[str, _Loss] = {
        "ours": partial(_ours, tokens, None),
        "ours, torch": partial(_ours, tokens, "torch"),
        "TRL": partial(_trl, labels),
        "princeton": partial(_princeton, labels),
    }
    try:
        liger = importlib.import_module("liger_kernel.chunked_loss")
    except ImportError:
        return losses
    for compiled in (False, True):
        module = liger.LigerFusedLinearSimPOLoss(beta=_BETA, gamma=_GAMMA, compute_nll_loss=False, compiled=compiled)
        losses["Liger compiled" if compiled else "Liger"] = partial(_liger, module, labels)
    return losses


def _ours(tokens: ResponseTokens, backend: Literal["torch"] | None, hidden: Tensor, weight: Tensor) -> Tensor:
    vocab = VocabShard(start=0, size=len(weight))
    logp = fused_linear_log_probs(hidden, weight, tokens, vocab=vocab, tp_group=None, backend=backend)
    averages, counts = average_log_probs(logp, tokens.on(logp.device).sequence_N, 2 * tokens.num_pairs)
    objective = SimPOObjective(beta=_BETA, gamma_beta_ratio=_GAMMA / _BETA)
    return preference_loss(averages, counts, objective=objective).loss / tokens.num_pairs


def _trl(labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """TRL's selective_log_softmax in bf16, row by row, where TRL is not installed to lend its own."""
    try:
        log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    except ImportError:
        log_softmax = _row_by_row
    return _simpo(log_softmax(hidden @ weight.t(), labels.clamp(min=0)), labels)


def _row_by_row(logits: Tensor, index: Tensor) -> Tensor:
    rows = [row.log_softmax(-1).gather(-1, i[:, None])[:, 0] for row, i in zip(logits, index, strict=True)]
    return torch.stack(rows)


def _princeton(labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """A copy of the logits in fp32 and their log-softmax, as the authors' trainer has them."""
    logps = (hidden @ weight.t()).float().log_softmax(-1)
    return _simpo(logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0], labels)


def _liger(module: torch.nn.Module, labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    order = torch.cat((torch.arange(0, len(labels), 2), torch.arange(1, len(labels), 2)))
    loss: Tensor = module(weight, hidden[order], labels[order.to(labels.device)])[0]
    return loss


def _simpo(logps: Tensor, labels: Tensor) -> Tensor:
    mask = labels >= 0
    averages = (logps * mask).sum(-1) / mask.sum(-1)
    return -F.logsigmoid(_BETA * (averages[0::2] - averages[1::2]) - _GAMMA).mean()
