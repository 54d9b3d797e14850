"""Packs with shared prompts against separate sequences, through the attention that this device has."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel

from simpo_megatron.gpu_check.small_model import microbatch_of, random_model, random_pairs
from simpo_megatron.gpu_check.timing import median_seconds, relative_error
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict
from simpo_megatron.mcore.microbatch import Microbatch, output_of

FP32_BUDGET, BF16_BUDGET = 2e-5, 3e-2
"""Relative errors of log-probs and of the embedding's gradient; kernels sum in different orders."""


def check_packs(setting: CheckSetting) -> Verdict:
    """Checks that a pack has the log-probs and gradient of its pairs one by one, in bf16 and fp32."""
    worst: dict[str, float] = {}
    for bf16, budget in ((True, BF16_BUDGET), (False, FP32_BUDGET)):
        with random_model(setting, bf16=bf16) as model:
            pairs = random_pairs(setting, num_pairs=setting.size(8, 3), longest=setting.size(700, 20))
            together = _log_probs_and_gradient(model, [microbatch_of(pairs, setting)])
            alone = [microbatch_of([pair], setting, prefix_sharing=False) for pair in pairs]
            for name, found, expected in zip(("logp", "gradient"), together, _log_probs_and_gradient(model, alone)):
                worst[f"{'bf16' if bf16 else 'fp32'} {name}"] = relative_error(found, expected) / budget
    value = ", ".join(f"{name} at {share:.0%}" for name, share in worst.items())
    return Verdict.of(
        max(worst.values()) <= 1, f"{value} of its budget", "fp32 2e-5, bf16 3e-2, relative", shares=worst
    )


def _log_probs_and_gradient(
    model: DistributedDataParallel, microbatches: list[Microbatch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs by pair, response and token; gradient of their sum in the embedding)."""
    model.zero_grad_buffer()
    found = []
    for microbatch in microbatches:
        log_probs_N = output_of(model, microbatch)
        log_probs_N.sum().backward()
        order = torch.argsort(microbatch.response_tokens.sequence_N.cpu(), stable=True)
        found.append(log_probs_N.detach()[order.to(log_probs_N.device)])
    return torch.cat(found), model.module.embedding.word_embeddings.weight.main_grad.clone()


def measure_pack(setting: CheckSetting) -> Verdict:
    """Measures forward and backward of a pack of many segments, and that another pack needs no compilation."""
    with random_model(setting, bf16=True) as model:
        packs = [
            microbatch_of(random_pairs(setting, setting.size(8, 2), longest), setting)
            for longest in (setting.size(600, 20), setting.size(610, 21))
        ]

        def step(pack: Microbatch) -> None:
            output_of(model, pack).sum().backward()

        usual = median_seconds(lambda: step(packs[0]), setting)
        first = _first_seconds(lambda: step(packs[1]), setting)
    value = f"{1e3 * usual:.1f} ms, another pack's first time {1e3 * first:.1f} ms"
    holds = setting.rehearse or first < 5 * usual + 0.05
    return Verdict.of(holds, value, "not judged" if setting.rehearse else "a new pack takes at most 5 x and 50 ms more")


def _first_seconds(work: Callable[[], object], setting: CheckSetting) -> float:
    start = time.perf_counter()
    work()
    if not setting.rehearse:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check_synchronizations(setting: CheckSetting) -> Verdict:
    """Checks that the host never waits for the device within a microbatch."""
    with random_model(setting, bf16=True) as model:
        pack = microbatch_of(random_pairs(setting, setting.size(8, 2), setting.size(300, 20)), setting)
        output_of(model, pack).sum().backward()
        if setting.rehearse:
            output_of(model, pack).sum().backward()
            return Verdict.of(True, "ran", "not judged")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output_of(model, pack).sum().backward()
        except RuntimeError as error:
            return Verdict.of(False, str(error).splitlines()[0][:200], "no synchronization")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Verdict.of(True, "none", "no synchronization")
