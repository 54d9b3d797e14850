"""Process groups as values; the only module that reads megatron's global parallel_state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from simpo_megatron.launched import RENDEZVOUS, check_environment
from simpo_megatron.parallel_sizes import ParallelSizes


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """This rank's process groups; every group may be of size one and takes the same path then."""

    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    ep: ProcessGroup
    """Ranks of one stage that hold different experts, each of them whole; they cut across tp and dp."""
    expert_dp: ProcessGroup
    """Ranks that hold the same experts."""
    sizes: ParallelSizes

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` of the last pipeline stage, in place, on every stage.

        Collectives: one broadcast over pp.
        """
        if self.pp.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.pp, self.pp.size() - 1), group=self.pp)
        return tensor


def join(backend: str, timeout_minutes: float, store: dist.Store | None = None) -> None:
    """Join the ranks that were started together, unless this process has already joined.

    `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` come from torchrun. A process without any of them, such as a
    notebook, is the only rank. NCCL gets the rank's GPU. So each group's communicator is made with the group, while all
    ranks are at the same place, and not at its first use.

    Args:
        store: the store of the rendezvous; None: the one at MASTER_ADDR:MASTER_PORT.

    Collectives: the rendezvous, world.

    Raises:
        ConfigError: some of these variables are set and others are not.
    """
    if dist.is_initialized():
        return
    device = None
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    if not any(name in os.environ for name in RENDEZVOUS):
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device
        )
        return
    check_environment()
    if store is None:
        dist.init_process_group(backend, timeout=timeout, device_id=device)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # For communicators that are made at their first use, while a peer may still do something long.
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)


def initialize(sizes: ParallelSizes, *, backend: str, timeout_minutes: float = 30.0) -> ParallelGroups:
    """The groups of this rank, after torch.distributed and megatron's parallel_state were set up.

    Collectives: those of `join`, and one group construction per kind of group, world.
    """
    from megatron.core import parallel_state

    join(backend, timeout_minutes)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor,
            pipeline_model_parallel_size=sizes.pipeline,
            virtual_pipeline_model_parallel_size=sizes.virtual_pipeline,
            context_parallel_size=sizes.context,
            expert_model_parallel_size=sizes.expert,
            expert_tensor_parallel_size=1,
            # This package does not use them. With eager NCCL communicators each would cost one more split of the
            # world, on the ranks that are not its members.
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
        )
    return ParallelGroups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        sizes=sizes,
    )


def data_parallel_rank() -> int:
    """The data-parallel rank, which selects this rank's pairs, where other code has set up megatron's groups."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


@contextmanager
def alone() -> Iterator[ParallelGroups]:
    """Groups of size one for a single process on the CPU; megatron's layers require groups."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield initialize(ParallelSizes(), backend="gloo")
    finally:
        shut_down()


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and megatron's tensor-parallel random states.

    Pipeline stages draw different numbers (megatron's offset of 100 a stage); tensor-parallel ranks agree where
    weights are replicated and differ inside their own regions.
    """
    import random

    import numpy as np
    from megatron.core import parallel_state, tensor_parallel

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def shut_down() -> None:
    """Leave the process groups in order, so that no rank is torn down inside a peer's collective."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
