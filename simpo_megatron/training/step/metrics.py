"""Metrics of a step from the sums of its microbatches: added first, divided once, over the global batch.

Names are those that TRL logs, so that curves of both can be compared. Units: log-probs in nats per token,
rewards in beta times that, lengths in tokens, accuracies as shares.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.loss import MONITORED, length_correlation
from simpo_megatron.mcore import device
from simpo_megatron.parallel import ParallelGroups

SUMMED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "response_length/chosen",
    "response_length/rejected",
    *MONITORED,
    "sft_loss",
)


def reduce_sums(sums: Sequence[dict[str, Tensor]], num_pairs: int, groups: ParallelGroups) -> dict[str, float]:
    """Means over `num_pairs` pairs of the metrics that PreferenceResult and the monitors sum, the same on every rank.

    Args:
        sums: one dict per microbatch of this rank; only the last pipeline stage has any.
        num_pairs: pairs in the sums of all data-parallel ranks together.

    `sft_loss` is present only when some rank summed it. `rewards/length_correlation` replaces its sums, unless all
    lengths or all rewards are the same.

    Collectives: one all-reduce of 136 bytes over dp on the last stage, then one broadcast over pp.
    """
    # In float64: a sum of token counts exceeds the integers that float32 holds exactly. The last entry counts
    # the microbatches that had an sft term.
    total = torch.zeros(len(SUMMED) + 1, dtype=torch.float64, device=device.current_device())
    if groups.is_last_stage:
        absent = total.new_zeros(())
        for microbatch in sums:
            total[:-1] += torch.stack([microbatch.get(name, absent).double() for name in SUMMED])
            total[-1] += "sft_loss" in microbatch
        dist.all_reduce(total, group=groups.dp)
    groups.broadcast_from_last_stage(total)
    *values, num_with_sft = total.tolist()
    means = {name: value / num_pairs for name, value in zip(SUMMED, values, strict=True)}
    if not num_with_sft:
        del means["sft_loss"]
    # Two responses a pair: their sums over the pairs are twice their means.
    correlation = length_correlation(means, num_responses=2)
    if correlation is not None:
        means["rewards/length_correlation"] = correlation
    return {name: mean for name, mean in means.items() if not name.startswith("_")}


def throughput(*, num_pairs: int, num_tokens: int, seconds: float) -> dict[str, float]:
    """Speed of steps over all ranks.

    Args:
        num_pairs: pairs of the steps, over all ranks.
        num_tokens: real tokens of the steps, padding apart, over all data-parallel ranks.
        seconds: wall time from the end of the step before them.
    """
    return {"pairs_per_second": num_pairs / seconds, "tokens_per_second": num_tokens / seconds}


def utilization(flops_per_second: float, peak: float | None) -> dict[str, float]:
    """Useful FLOP/s of a rank, without recomputation, and MFU, their share of the GPU's peak.

    Args:
        flops_per_second: of one rank.
        peak: FLOP/s of its GPU by the data sheet; None: unknown, and no MFU is returned.
    """
    share = {} if peak is None else {"mfu": flops_per_second / peak}
    return {"tflops_per_gpu": flops_per_second / 1e12, **share}


def memory_use() -> dict[str, float]:
    """Peak memory of this rank; on a GPU also the bytes that torch reserved, and its allocation retries."""
    use = {"peak_memory_gib": peak_memory_bytes() / 2**30}
    if device.has_cuda():
        use["reserved_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        use["allocation_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    return use


def peak_memory_bytes() -> int:
    """Most memory this process has held so far: allocated on its GPU, or resident where there is none."""
    if device.has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
