"""Seconds of a step's phases on this rank, by the clock of its device, and the slowest rank."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import record_function

from simpo_megatron.mcore import device
from simpo_megatron.parallel import ParallelGroups

DATA, FORWARD_BACKWARD, OPTIMIZER = "data", "forward_backward", "optimizer"
PHASES = (DATA, FORWARD_BACKWARD, OPTIMIZER)
FORWARD = "forward"
"""A microbatch's way through a chunk, within FORWARD_BACKWARD: no wait for other stages or replicas is in it."""

BEHIND_LIMIT = 0.10
"""Share by which a rank is slower than its peers when it is named."""

_Moment = float | torch.cuda.Event


class StepTimes:
    """The phases that a rank went through since `clear`; each is a range of a profile as well."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, _Moment, _Moment]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the context under `name`, without making the host wait for the device."""
        with record_function(name):
            start = _now()
            yield
            self._spans.append((name, start, _now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase; 0 for a phase that did not occur."""
        if self._spans and device.has_cuda():
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            total[name] += _between(start, end)
        return total

    def clear(self) -> None:
        """Forget what was timed so far."""
        self._spans = []


def _now() -> _Moment:
    if not device.has_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: _Moment, end: _Moment) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1e3


class Pace(NamedTuple):
    """The speed of a rank at its own work."""

    stage: int
    replica: int
    """The number of the model's replica; its tensor- and context-parallel ranks wait for each other."""
    seconds_per_flop: float


def gather_paces(seconds: float, flops: float, groups: ParallelGroups) -> list[Pace]:
    """The pace of every rank, by rank: `seconds` for `flops` useful operations of its own.

    Collectives: one all-reduce of 24 bytes a rank, world.
    """
    own = [groups.pp.rank(), groups.dp.rank(), seconds / flops if flops else 0.0]
    every = torch.zeros(dist.get_world_size(), len(own), dtype=torch.float64)
    every[dist.get_rank()] = torch.tensor(own, dtype=torch.float64)
    every = every.to(device.current_device())
    dist.all_reduce(every)
    return [Pace(int(stage), int(replica), pace) for stage, replica, pace in every.tolist()]


def slowest_rank(paces: list[Pace]) -> tuple[int, float] | None:
    """(rank, excess of its time over the median of its peers, as a share) of the slowest; None when all are as fast.

    Its peers are the ranks of the same pipeline stage in other replicas of the model. Ranks of one replica wait for
    each other within a layer, so the slow one among them is unknown: the first with the longest time is named.
    """
    found: tuple[int, float] | None = None
    for rank, pace in enumerate(paces):
        likes = [p.seconds_per_flop for p in paces if p.stage == pace.stage and p.replica != pace.replica]
        usual = median(likes) if likes else 0.0
        behind = pace.seconds_per_flop / usual - 1 if usual else 0.0
        if behind >= BEHIND_LIMIT and (found is None or behind > found[1]):
            found = rank, behind
    return found
