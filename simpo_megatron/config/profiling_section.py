"""Options of profiling, under Megatron's names."""

from __future__ import annotations

from dataclasses import dataclass

from simpo_megatron.errors import require
from simpo_megatron.option_field import option


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Profiles of some steps on some ranks, and the history of the GPU's memory."""

    profile: bool = option(
        False,
        "Profile some steps: for Nsight Systems, or with use_pytorch_profiler. Start the run under nsys with "
        "--capture-range=cudaProfilerApi --capture-range-end=stop; steps and their phases are NVTX ranges.",
    )
    profile_step_start: int = option(10, "Profile the steps after this one.")
    profile_step_end: int = option(12, "Last step to profile.")
    profile_ranks: tuple[int, ...] = option((0,), "Ranks to profile.")
    use_pytorch_profiler: bool = option(
        False,
        "Profile with PyTorch's profiler, also without a GPU. Traces for Perfetto and TensorBoard go to "
        "tensorboard_dir, or else to SAVE/profile.",
    )
    record_memory_history: bool = option(
        False,
        "Record the allocations on the last rank's GPU. SAVE/profile/memory_rank0000.pickle, for "
        "pytorch.org/memory_viz, is written at the end, and when memory did not suffice.",
    )

    def __post_init__(self) -> None:
        start, end = self.profile_step_start, self.profile_step_end
        require(start >= 0, "profile_step_start", start, "0 or more")
        require(end > start, "profile_step_end", end, f"more than profile_step_start ({start})")
        require(len(self.profile_ranks) > 0, "profile_ranks", "none", "one rank or more")
        for rank in self.profile_ranks:
            require(rank >= 0, "profile_ranks", rank, "0 or more")
        require(self.profile or not self.use_pytorch_profiler, "use_pytorch_profiler", True, "profile with it")
