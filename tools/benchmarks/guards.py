"""The cost of a run's guards as shares of its steps, with the ranks, model and pairs of any run.

    torchrun --nproc-per-node 2 tools/benchmarks/guards.py --tp 2
    torchrun --nproc-per-node 8 tools/benchmarks/guards.py --config configs/llama3_8b_base_8xh100.yaml --model DIR ...

The arguments are those of examples/pretrain_simpo.py. After an ordinary run each guard is called
many times by all ranks together, and its median time is divided by that of a step. During a step ranks also
wait in `sync_status` for the slowest of them, which they would do in the step's next collective without it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from results import keep

from simpo_megatron.config import load_config
from simpo_megatron.ranks import sync_status
from simpo_megatron.training import loop
from simpo_megatron.training.peers.consistency import check_replicas, check_same, job_facts, startup_facts
from simpo_megatron.training.peers.watchdog import Watchdog
from simpo_megatron.training.run import train
from simpo_megatron.training.step import train_step

NUM_CALLS = 30


def main(argv: list[str]) -> None:
    """Trains, and measures at the end, when everything that the guards work on exists."""
    config, step_seconds, watches = load_config(argv), [], []

    def timed_step(*arguments: Any) -> Any:
        started = time.perf_counter()
        done = train_step(*arguments)
        torch.cuda.synchronize()
        step_seconds.append(time.perf_counter() - started)
        return done

    def noted_run(session: Any, *arguments: Any) -> Any:
        watches.append(session.watchdog)
        return run_in(session, *arguments)

    def measured_end(config: Any, job: Any, log: Any) -> None:
        finish(config, job, log)
        rows = measure(config, job, watches[0])
        if dist.get_rank() == 0:
            keep("guards", {"step seconds": statistics.median(step_seconds[1:]), "rows": rows})
            # The first step has start-up costs.
            print(*table(rows, statistics.median(step_seconds[1:])), sep="\n", flush=True)

    finish, run_in = loop.finish, loop.run_in
    loop.train_step, loop.run_in, loop.finish = timed_step, noted_run, measured_end
    train(config)


def measure(config: Any, job: Any, watchdog: Watchdog) -> list[tuple[str, str, float, int]]:
    """(guard, when it is called, seconds a call, calls then) of each guard."""
    trainer = job.trainer
    facts = {**startup_facts(config), **job_facts(job)}
    return [
        ("sync_status", "step", median_seconds(lambda: sync_status(None, 0, checksum=1)), 2),
        ("watchdog", "step", median_seconds(lambda: watchdog.enter_phase("the benchmark", timeout=3600)), 1),
        ("weights compared", "save", median_seconds(lambda: check_replicas(trainer.chunks, trainer.groups)), 1),
        ("options and code compared", "start", median_seconds(lambda: check_same(facts)), 2),
    ]


def median_seconds(guard: Callable[[], Any]) -> float:
    """The median seconds of a call by all ranks together."""
    times = []
    for _ in range(NUM_CALLS):
        dist.barrier()
        started = time.perf_counter()
        guard()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def table(rows: list[tuple[str, str, float, int]], step_seconds: float) -> list[str]:
    """The lines to print."""
    lines = [f"the median step takes {1e3 * step_seconds:.1f} ms"]
    lines.append(f"{'guard':<26} {'each':>9}   {'calls':<8} {'of a step':>8}")
    for name, when, seconds, num_calls in rows:
        share = num_calls * seconds / step_seconds
        lines.append(f"{name:<26} {1e3 * seconds:6.2f} ms   {num_calls} a {when:<6} {share:8.2%}")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
