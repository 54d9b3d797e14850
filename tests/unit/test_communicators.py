"""NCCL's communicators are made with their groups, by the same splits of the world on every rank.

A split of NCCL is a collective of all ranks: torch calls it on the members of a new group and on the others, and the
k-th of one rank meets the k-th of every other. Recorded on torch's fake backend, each rank in turn.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from simpo_megatron import parallel
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.parallel_sizes import ParallelSizes

LAYOUTS = {
    "tp2 pp2 dp2": (ParallelSizes(tensor=2, pipeline=2), 8),
    "tp8 pp4": (ParallelSizes(tensor=8, pipeline=4), 32),
    "tp2 pp2 vpp2 cp2 dp2": (ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2, context=2), 16),
    "tp2 ep4 dp4": (ParallelSizes(tensor=2, expert=4), 8),
}


@pytest.fixture
def splits(monkeypatch):
    """The groups for which this rank would call a split of NCCL's, in order."""
    seen: list[tuple[int, ...]] = []
    new_group = distributed_c10d._new_process_group_helper
    current: list[tuple[int, ...]] = [()]

    def make(size, rank, ranks, backend, *args, **options):
        current[0] = tuple(ranks)
        is_member = dist.is_initialized() and dist.get_rank() in ranks
        if is_member and backend == "fake":
            seen.append(tuple(ranks))
        # Members of a gloo group connect and split nothing.
        return new_group(size, rank, ranks, "fake" if backend == "gloo" else backend, *args, **options)

    nccl = SimpleNamespace(perform_nocolor_split=lambda device: seen.append(current[0]))
    monkeypatch.setattr(distributed_c10d, "_new_process_group_helper", make)
    monkeypatch.setattr(distributed_c10d, "_get_split_source", lambda group: nccl)
    return seen


def play(rank: int, world_size: int, sizes: ParallelSizes) -> None:
    """The groups of one rank of the layout, made under a default group that has a GPU."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
    try:
        parallel.initialize(sizes, backend="fake")
    finally:
        parallel.shut_down()


@pytest.mark.parametrize(("sizes", "world_size"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_splits_the_world_for_the_same_groups_in_the_same_order(splits, sizes, world_size):
    cpu_patches.install()
    of_ranks = set()
    for rank in (0, 1, world_size // 2, world_size - 1):
        splits.clear()
        play(rank, world_size, sizes)
        of_ranks.add(tuple(splits))
    (order,) = of_ranks
    assert len(order) > 2 * world_size // 8, "groups are seen"


def test_groups_of_another_backend_would_be_splits_of_some_ranks_only(splits, monkeypatch):
    from megatron.core import parallel_state

    cpu_patches.install()
    make = parallel_state.initialize_model_parallel
    monkeypatch.setattr(
        parallel_state,
        "initialize_model_parallel",
        lambda **options: make(**options | {"create_gloo_process_groups": True}),
    )
    of_ranks = set()
    for rank in (0, 7):
        splits.clear()
        play(rank, 8, ParallelSizes(tensor=2, pipeline=2))
        of_ranks.add(tuple(splits))
    assert len(of_ranks) == 2


@pytest.mark.parametrize("launched", [True, False])
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_nccl_is_told_the_ranks_gpu(monkeypatch, backend, launched):
    asked, chosen = [], []
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value) if launched else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.append(options["device_id"]))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    parallel.join(backend, 1.0)
    gpu = torch.device("cuda", 3)
    assert (asked, chosen) == (([gpu], [gpu]) if backend == "nccl" else ([None], []))
