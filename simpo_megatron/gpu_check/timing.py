"""Times and rates on the device of a check."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from simpo_megatron.gpu_check.verdict import CheckSetting


def median_seconds(work: Callable[[], object], setting: CheckSetting, repeats: int = 10) -> float:
    """Seconds of `work` on the device: the median of several, after three that do not count."""
    if setting.rehearse:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def peak_bytes(work: Callable[[], object], setting: CheckSetting) -> int:
    """Peak bytes of `work` beyond those allocated before; 0 in a rehearsal, where nothing counts them."""
    if setting.rehearse:
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of `expected`, in float64; infinite where `found` is not finite."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
    return float(difference) if bool(difference.isfinite()) else float("inf")
