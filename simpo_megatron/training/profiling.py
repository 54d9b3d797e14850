"""Profiles of the steps and ranks that `--profile` selects, and a GPU's memory history, as in Megatron-LM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.utils import configure_nvtx_profiling
from torch.profiler import record_function, schedule, tensorboard_trace_handler

from simpo_megatron.config import Config

_MAX_ALLOCATIONS = 100_000
"""Megatron-LM's length of the history; older allocations are forgotten."""


class Profiler:
    """The profile of a run on this rank; does nothing on ranks and steps that are not selected.

    Use as a context manager around the steps, and `step` around each. A run that fails or stops in between keeps what
    was recorded.

    Source: Megatron-LM's training loop (megatron/training/training.py), which profiles the steps after
    `profile_step_start` up to `profile_step_end`.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        """`first_step` is the run's first step, counted from 1; larger after a resume."""
        options, rank = config.profiling, dist.get_rank()
        self._options = options
        self._is_profiled = options.profile and rank in options.profile_ranks
        self._first = max(first_step, options.profile_step_start + 1)
        # PyTorch's profiler starts up during its first step, so that step is discarded.
        self._num_warmup = int(options.use_pytorch_profiler and self._first > first_step)
        self._keeps_history = options.record_memory_history and rank == dist.get_world_size() - 1
        self._traces, self._history = _folders(config)
        self._rank = f"rank{rank:04}"
        self._torch: torch.profiler.profile | None = None
        self._running = ExitStack()

    def __enter__(self) -> Profiler:
        if self._keeps_history:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()
        if self._keeps_history:
            self._history.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._history / f"memory_{self._rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """A range `step N`, profiled if it is one of those steps; profiling starts before the first of them."""
        if self._is_profiled and iteration == self._first - self._num_warmup <= self._options.profile_step_end:
            self._start()
        with record_function(f"step {iteration}"):
            yield
        if self._torch is not None:
            self._torch.step()
        if iteration == self._options.profile_step_end:
            self._running.close()
            self._torch = None

    def _start(self) -> None:
        if self._options.use_pytorch_profiler:
            self._torch = self._running.enter_context(
                torch.profiler.profile(
                    schedule=schedule(
                        wait=0,
                        warmup=self._num_warmup,
                        active=self._options.profile_step_end - self._first + 1,
                        repeat=1,
                    ),
                    on_trace_ready=tensorboard_trace_handler(str(self._traces), worker_name=self._rank),
                    record_shapes=True,
                    with_stack=True,
                )
            )
            return
        self._running.callback(torch.cuda.profiler.stop)
        torch.cuda.profiler.start()
        self._running.enter_context(torch.autograd.profiler.emit_nvtx(record_shapes=True))
        # megatron's own ranges, of the parts of a layer.
        self._running.callback(configure_nvtx_profiling, False)
        configure_nvtx_profiling(True)


def _folders(config: Config) -> tuple[Path, Path]:
    """The folders of traces and of the memory history: `tensorboard_dir`, whose plugin finds them, and SAVE/profile."""
    run = config.run
    own = Path(run.save or "runs/unsaved") / "profile"
    return Path(run.tensorboard_dir) if run.tensorboard_dir is not None else own, own


def describe_profile(config: Config, first_step: int, last_step: int) -> list[str]:
    """A line on what will be profiled of the steps `first_step` to `last_step` of this start, if anything is to be."""
    options, lines = config.profiling, []
    traces, history = _folders(config)
    if options.profile:
        first, last = max(first_step, options.profile_step_start + 1), min(options.profile_step_end, last_step)
        ranks = ", ".join(map(str, options.profile_ranks))
        place = f"PyTorch's profiler, into {traces}" if options.use_pytorch_profiler else "Nsight Systems"
        lines.append(f"profile   steps {first} to {last} on ranks {ranks}: {place}")
        if first > last:
            lines = [
                f"WARNING   profile: found profile_step_start {options.profile_step_start} and profile_step_end "
                f"{options.profile_step_end}, expected steps from {first_step} to {last_step}; nothing is profiled"
            ]
    if options.record_memory_history:
        lines.append(f"profile   allocations on the last rank's GPU, into {history}")
    return lines
