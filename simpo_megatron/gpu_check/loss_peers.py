"""Losses of other packages from hidden states and the head, as far as they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simpo_megatron.gpu_check.verdict import CheckSetting
from simpo_megatron.mcore import cpu_patches

BETA, GAMMA = 2.0, 1.0
Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of hidden states [R, S, H] and the head [v, H], for labels [R, S] of chosen and rejected rows in turn."""


def peer_losses(labels: Tensor, setting: CheckSetting) -> tuple[dict[str, Loss], dict[str, str]]:
    """(losses by name, reasons by name of missing ones), for labels with -100 where nothing is predicted.

    SimPO on the log-probs of princeton's trainer, TRL, Cut Cross Entropy and megatron-core; Liger's own SimPO;
    the mean of Liger's linear cross entropy, whose gradients are those of a mean.
    """
    makers: dict[str, Callable[[Tensor, CheckSetting], Loss]] = {
        "princeton": lambda labels, _: partial(_princeton, labels),
        "TRL": _trl,
        "Liger": partial(_liger, compiled=False),
        "Liger compiled": partial(_liger, compiled=True),
        "Liger linear CE": _liger_linear_cross_entropy,
        "CCE": _cut_cross_entropy,
        "megatron CE": _megatron,
    }
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make(labels, setting)
        except ImportError as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def _princeton(labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """The log-softmax of a fp32 copy of the logits, as in the authors' trainer."""
    logps = (hidden @ weight.t()).float().log_softmax(-1)
    return _simpo(logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0], labels)


def _trl(labels: Tensor, setting: CheckSetting) -> Loss:
    log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return lambda hidden, weight: _simpo(log_softmax(hidden @ weight.t(), labels.clamp(min=0)), labels)


def _liger(labels: Tensor, setting: CheckSetting, *, compiled: bool) -> Loss:
    module = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearSimPOLoss(
        beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=compiled and not setting.rehearse
    )
    # Chosen first, then rejected.
    order = torch.cat((torch.arange(0, len(labels), 2), torch.arange(1, len(labels), 2)))
    in_order = labels[order.to(labels.device)]
    return lambda hidden, weight: module(weight, hidden[order], in_order)[0]


def _liger_linear_cross_entropy(labels: Tensor, setting: CheckSetting) -> Loss:
    name = "liger_kernel.transformers.fused_linear_cross_entropy"
    module = importlib.import_module(name).LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight: module(weight, hidden.flatten(0, 1), labels.flatten())


def _cut_cross_entropy(labels: Tensor, setting: CheckSetting) -> Loss:
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    # Its kernels need a GPU; its torch version would compile for a minute.
    if setting.rehearse:
        raise ImportError("its kernels are for GPUs alone")
    return lambda hidden, weight: _simpo(-linear_cross_entropy(hidden, weight, labels, reduction="none"), labels)


def _megatron(labels: Tensor, setting: CheckSetting) -> Loss:
    cpu_patches.install()
    module = importlib.import_module("megatron.core.fusions.fused_cross_entropy")
    targets_SR = labels.clamp(min=0).t().contiguous()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits_SRv = (hidden @ weight.t()).transpose(0, 1).contiguous()
        # On a CPU it would compile for a minute.
        with torch.compiler.set_stance("force_eager" if setting.rehearse else "default"):
            nll_SR = module.fused_vocab_parallel_cross_entropy(logits_SRv, targets_SR, dist.group.WORLD)
        return _simpo(-nll_SR.t(), labels)

    return loss


def _simpo(logps: Tensor, labels: Tensor) -> Tensor:
    mask: Any = labels >= 0
    averages = (logps * mask).sum(-1) / mask.sum(-1)
    return -F.logsigmoid(BETA * (averages[0::2] - averages[1::2]) - GAMMA).mean()
