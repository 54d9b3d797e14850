"""Time and memory of the loss on the device, against its three products and its peers."""

from __future__ import annotations

import time
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.gpu_check.loss_peers import BETA, GAMMA, Loss, peer_losses
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
from simpo_megatron.mcore import device

FLOOR_BUDGET, TRL_BUDGET = 1.15, 0.4
_PEER_SECONDS = 45
"""After so many no other peer is begun; one that compiles takes half a minute."""
# Hidden size and columns of the vocabulary on a rank. Half of the positions of a batch are prompt.
_SHAPES = {"70B tp8": (8192, 16_032), "8B tp1": (4096, 128_256), "1B tp1": (2048, 128_256)}
_TINY = {"tiny": (16, 300)}
# Columns of a block by the byte budget alone, with rows at odd addresses, and a multiple of 256.
_BLOCK_WIDTHS = (2291, 2304)


def measure_loss(setting: CheckSetting) -> Verdict:
    """Checks for 1.15 times the three products and 0.4 of TRL's time, at three shapes."""
    ratios: dict[str, float] = {}
    details: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    until = time.monotonic() + (float("inf") if setting.rehearse else _PEER_SECONDS)
    dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name, (hidden_size, width) in (_TINY if setting.rehearse else _SHAPES).items():
            found, missing_here = _measure_shape(hidden_size, width, setting, until)
            details[name], missing = found, missing | missing_here
            ratios[f"{name} of the products"] = found["ours ms"] / found["products ms"]
            if "TRL ms" in found:
                ratios[f"{name} of TRL"] = found["ours ms"] / found["TRL ms"]
    finally:
        dist.destroy_process_group()
    value = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    value += f"; without {', '.join(missing)}" if missing else ""
    budget = f"{FLOOR_BUDGET} of the products, {TRL_BUDGET} of TRL's"
    fast = all(ratio <= (FLOOR_BUDGET if "products" in name else TRL_BUDGET) for name, ratio in ratios.items())
    budget = "not judged" if setting.rehearse else budget
    return Verdict.of(fast or setting.rehearse, value, budget, shapes=details, missing=missing)


def _measure_shape(
    hidden_size: int, width: int, setting: CheckSetting, until: float
) -> tuple[dict[str, float], dict[str, str]]:
    """(milliseconds and MiB by loss, losses that have not run and why)."""
    num_rows, length = setting.size(8, 4), setting.size(1024, 16)
    random = torch.Generator(setting.device).manual_seed(0)
    draw = partial(torch.randn, generator=random, device=setting.device)
    hidden = draw(num_rows, length, hidden_size).bfloat16()
    weight = (draw(width, hidden_size) * hidden_size**-0.5).bfloat16()
    labels = torch.randint(0, width, (num_rows, length), generator=torch.Generator().manual_seed(0))
    labels[:, : length // 2] = -100
    leaves = hidden.requires_grad_(), torch.nn.Parameter(weight)
    num_response_rows = int((labels >= 0).sum())
    found = {"products ms": 1e3 * median_seconds(partial(_products, *leaves, num_response_rows, width), setting)}
    for columns in (columns for columns in _BLOCK_WIDTHS if columns < width):
        work = partial(_products, *leaves, num_response_rows, columns)
        found[f"products, {columns} columns ms"] = 1e3 * median_seconds(work, setting)
    losses, missing = peer_losses(labels.to(setting.device), setting)
    for name, loss in {**_our_losses(labels, setting), **losses}.items():
        is_ours = name.startswith("ours")
        if not is_ours and time.monotonic() > until:
            missing[name] = f"not begun at {hidden_size} x {width}, for the time was short"
            continue
        work = partial(_forward_backward, loss, *leaves)
        try:
            found[f"{name} ms"] = 1e3 * median_seconds(work, setting)
            found[f"{name} MiB"] = peak_bytes(work, setting) / 2**20
        except Exception as error:
            if is_ours:
                raise
            # A peer that cannot run here is no failure of ours.
            missing[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return found, missing


def _products(hidden: Tensor, weight: Tensor, num_rows: int, columns: int) -> None:
    """The three products over the response rows, `columns` at a time, which every exact loss needs."""
    with torch.no_grad():
        rows = hidden.flatten(0, 1)[:num_rows]
        for part in weight.split(columns):
            logits = rows @ part.t()
            logits @ part
            logits.t() @ rows


def _forward_backward(loss: Loss, hidden: Tensor, weight: Tensor) -> None:
    hidden.grad = weight.grad = None
    loss(hidden, weight).backward()


def _our_losses(labels: Tensor, setting: CheckSetting) -> dict[str, Loss]:
    tokens = ResponseTokens.from_labels(labels)
    here = (x.to(setting.device) for x in (tokens.rows_N, tokens.targets_N, tokens.sequence_N))
    tokens = tokens.with_copy(*here)
    return {"ours": partial(_ours, tokens, None), "ours, torch": partial(_ours, tokens, "torch")}


def _ours(tokens: ResponseTokens, backend: Literal["torch"] | None, hidden: Tensor, weight: Tensor) -> Tensor:
    vocab = VocabShard(start=0, size=len(weight))
    logp = fused_linear_log_probs(hidden, weight, tokens, vocab=vocab, tp_group=None, backend=backend)
    averages, counts = average_log_probs(logp, tokens.on(logp.device).sequence_N, 2 * tokens.num_pairs)
    objective = SimPOObjective(beta=BETA, gamma_beta_ratio=GAMMA / BETA)
    return preference_loss(averages, counts, objective=objective).loss / tokens.num_pairs
