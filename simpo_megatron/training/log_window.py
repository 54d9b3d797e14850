"""The steps since the last log line: their means, their speed, and what they cost."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from simpo_megatron.config import Config
from simpo_megatron.mcore import device
from simpo_megatron.mcore.layers import LOAD_BALANCING_LOSS
from simpo_megatron.planning.gpus import peak_bf16_flops
from simpo_megatron.planning.shapes import ModelShape
from simpo_megatron.planning.speed import pairs_flops
from simpo_megatron.training.start.setup import Job
from simpo_megatron.training.step import (
    DATA,
    FORWARD,
    PHASES,
    Pass,
    gather_paces,
    memory_use,
    reduce_sums,
    slowest_rank,
    throughput,
    utilization,
)


class LogWindow:
    """The passes since the last log line, and how long they took."""

    def __init__(self, config: Config, job: Job) -> None:
        self._config = config
        self._groups, self._times = job.trainer.groups, job.trainer.times
        self._shape = ModelShape.of(job.plan.description)
        # The bf16 rate of a data sheet says nothing of a run in fp32.
        has_peak = device.has_cuda() and config.precision.bf16
        self._peak = peak_bf16_flops(torch.cuda.get_device_name()) if has_peak else None
        self._num_retries = 0
        self._passes: list[Pass] = []
        self.restart_clock()

    def add(self, computed: Pass) -> None:
        """Add a step."""
        self._passes.append(computed)

    def restart_clock(self) -> None:
        """Exclude the time since the last step, such as an evaluation's."""
        self._started = time.perf_counter()
        self._times.clear()

    def close(self) -> dict[str, float]:
        """Means, speed and cost of the window's steps; empties the window.

        Seconds of phases and memory are those of this rank. `slowest_rank` is set when a rank is `BEHIND_LIMIT` behind.

        Collectives: those of `reduce_sums` and `gather_paces`.
        """
        num_pairs = sum(computed.num_pairs for computed in self._passes)
        sums = [sums for computed in self._passes for sums in computed.sums]
        metrics = reduce_sums(sums, num_pairs, self._groups)
        balances = [c.load_balancing_loss for c in self._passes if c.load_balancing_loss is not None]
        if balances and len(balances) == len(self._passes):
            metrics[LOAD_BALANCING_LOSS] = sum(balances) / len(balances)
        metrics |= self._speed(num_pairs)
        metrics |= self._memory()
        self._passes = []
        self.restart_clock()
        return metrics

    def _speed(self, num_pairs: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        num_tokens = sum(computed.num_tokens for computed in self._passes)
        flops = self._flops(own=False)
        speed = throughput(num_pairs=num_pairs, num_tokens=num_tokens, seconds=seconds)
        speed |= utilization(flops / seconds / dist.get_world_size(), self._peak)
        phases = self._times.seconds()
        speed |= {f"{phase}_seconds": phases[phase] / len(self._passes) for phase in PHASES}
        paces = gather_paces(phases[DATA] + phases[FORWARD], self._flops(own=True), self._groups)
        if (found := slowest_rank(paces)) is not None:
            speed["slowest_rank"], speed["slowest_rank_behind"] = found
        return speed

    def _flops(self, *, own: bool) -> float:
        """Useful operations of the window's steps, or of this data-parallel rank's part of them."""
        return sum(
            pairs_flops(
                self._shape,
                *(computed.own_pairs if own else computed.pairs),
                prefix_sharing=self._config.batch.prefix_sharing,
                freezes_weights=self._config.lora.lora_rank is not None,
            )
            for computed in self._passes
        )

    def _memory(self) -> dict[str, float]:
        use = memory_use()
        if "allocation_retries" in use:
            so_far, use["allocation_retries"] = use["allocation_retries"], use["allocation_retries"] - self._num_retries
            self._num_retries = int(so_far)
        return use
