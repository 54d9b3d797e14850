"""Saves of two ranks that tell each other less and less: `save_strategy_worker.py FOLDER`.

Each rank leaves FOLDER/<rank>.json: for every save, which object collectives it took, and whether the checkpoint holds
the tensors of both ranks.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from simpo_megatron.checkpoint.save_strategy import SaveStrategy  # noqa: E402

calls: list[str] = []


def counted(name: str):
    original = getattr(dist, name)

    def count(*arguments, **options):
        calls.append(name)
        return original(*arguments, **options)

    return count


def held(rank: int, step: int, *, has_own: bool) -> dict[str, ShardedTensor]:
    """A tensor of which each rank holds a half, one that both hold and, if asked for, one of this rank alone."""
    state = {
        "halves": ShardedTensor.from_rank_offsets("halves", torch.arange(6.0) + 100 * step + 10 * rank, (0, rank, 2)),
        "both": ShardedTensor.from_rank_offsets("both", torch.full((5,), float(step)), replica_id=rank),
    }
    return state | ({"own": ShardedTensor.from_rank_offsets("own", torch.ones(3))} if has_own else {})


def save(strategy: SaveStrategy, state: dict[str, ShardedTensor], folder: Path) -> list[str]:
    """The object collectives that the save took."""
    calls.clear()
    of_save, validates = strategy.of_save(list(state.values()))
    takes_strategy = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    options = {"async_strategy": "mcore"} if takes_strategy else {}
    request = dist_checkpointing.save(
        state, str(folder), of_save, validate_access_integrity=validates, async_sharded_save=True, **options
    )
    if request.async_fn is not None:
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()
        request.async_fn(*arguments, **request.async_fn_kwargs)
    for finalize in request.finalize_fns:
        finalize()
    return sorted(calls)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    cpu_patches.write_checkpoints_in_threads()
    for name in ("all_gather_object", "gather_object"):
        setattr(dist, name, counted(name))
    strategy, found = SaveStrategy(dist.group.WORLD), []
    # From the fifth on rank 1 alone holds one more tensor.
    for step in range(7):
        path = folder / f"step{step}"
        path.mkdir(exist_ok=True)
        dist.barrier()
        told = save(strategy, held(rank, step, has_own=rank == 1 and step >= 4), path)
        dist.barrier()
        loaded = dist_checkpointing.load(held(rank, -1, has_own=False), str(path))
        expected = {name: tensor.data for name, tensor in held(rank, step, has_own=False).items()}
        found.append((told, all(torch.equal(loaded[name], values) for name, values in expected.items())))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
