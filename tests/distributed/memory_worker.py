"""Measure what steps of real training take in memory, on the ranks this script is started on.

`memory_worker.py FOLDER`: FOLDER/job.json names the cases; each rank leaves FOLDER/<case>.<rank>.json with the bytes
that one forward leaves allocated (`kept`, without pipelining) and the allocator's peak over one step (`peak`), both
beyond weights, gradients and optimizer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from simpo_megatron.mcore import cpu_patches, device

cpu_patches.install()

import torch  # noqa: E402
from layout_worker import ListDataset  # noqa: E402
from planning_cases import description_of, pairs_of  # noqa: E402
from ranks import leave_groups  # noqa: E402
from torch._C._profiler import _EventType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.config import config_from, resolve  # noqa: E402
from simpo_megatron.mcore.forward_step import ForwardStep  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402
from simpo_megatron.training.start.setup import build_trainer  # noqa: E402
from simpo_megatron.training.step import Trainer, batch_options, train_step  # noqa: E402
from simpo_megatron.training.step.passes import _materialise  # noqa: E402


def build(case: dict, world_size: int) -> Trainer:
    description, config = description_of(case), config_from(**case["options"])
    layout = resolve(config, world_size=world_size, model=description.transformer, machine=device.machine())
    groups = parallel.initialize(config.parallel.sizes, backend="gloo", timeout_minutes=3)
    parallel.seed_everything(1)
    bare = build_model(description, config, groups)
    for parameter in (parameter for chunk in bare for parameter in chunk.parameters()):
        torch.nn.init.normal_(parameter.data, std=0.02)
    options = batch_options(config, layout, pad_id=0)
    return build_trainer(bare, config, groups, layout, options, train_iters=10)


def kept_bytes(trainer: Trainer, dataset: ListDataset) -> int:
    """The bytes that the forward of one microbatch leaves allocated, with its loss."""
    (microbatch, *_) = _materialise(trainer, dataset, trainer.plan_step(dataset, 0)[0])
    step = ForwardStep(objective=trainer.objective, pairs_per_chosen_token=1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        output, loss = step(iter([microbatch]), trainer.chunks[0])
        result = loss(output)
    left = levels(profiled)[-1]
    del result
    return left


def peak_bytes(trainer: Trainer, dataset: ListDataset) -> int:
    """The allocator's highest level over one whole step, above where the step began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train_step(trainer, dataset, trainer.plan_step(dataset, 0))
    return max(levels(profiled))


def levels(profiled: profile) -> list[int]:
    """The bytes allocated since the start and not yet freed, after each event."""
    found, ahead = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while ahead:
        event = ahead.pop()
        ahead += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    held: dict[int, int] = {}
    level, of_events = 0, []
    # torch takes the size of a freed block from its address, also where another block was there in an earlier profile.
    for _, address, size in sorted(found, key=lambda entry: entry[0]):
        change = size if size > 0 else -held.pop(address, 0)
        if size > 0:
            held[address] = size
        level += change
        of_events.append(level)
    return of_events


def measure(case: dict, world_size: int) -> dict[str, int]:
    trainer = build(case, world_size)
    dataset = ListDataset(pairs_of(case))
    train_step(trainer, dataset, trainer.plan_step(dataset, 0))  # allocates the optimizer's state
    measured = {"peak": peak_bytes(trainer, dataset)}
    if world_size == 1:
        measured["kept"] = kept_bytes(trainer, dataset)
    measured["microbatches"] = len(trainer.plan_step(dataset, 0)[0])
    return measured


def main(folder: Path) -> None:
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for name, case in json.loads((folder / "job.json").read_text()).items():
        (folder / f"{name}.{rank}.json").write_text(json.dumps(measure(case, world_size)))
        leave_groups()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
