"""Train the same pairs under several parallel layouts, one after the other, on the ranks this script is started on.

`layout_worker.py FOLDER...`: FOLDER/job.json of each holds the model folder, the pairs and the layouts; a layout leaves
FOLDER/<name>.json (loss, gradient norm and margin of each step), FOLDER/<name>.samples<rank>.json (the greedy
continuations of the job's prompts, if it has any, by the trained weights) and FOLDER/<name>/ (those weights, fp32).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from simpo_megatron.mcore import cpu_patches, device

cpu_patches.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from ranks import leave_groups  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.config import Config, config_from, resolve  # noqa: E402
from simpo_megatron.convert import export_hf, load_hf_weights  # noqa: E402
from simpo_megatron.data import TokenizedPair  # noqa: E402
from simpo_megatron.errors import NumericsError  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402
from simpo_megatron.mcore.optimizer import gather_parameters  # noqa: E402
from simpo_megatron.training.reference import reference_log_probs  # noqa: E402
from simpo_megatron.training.repetition import greedy_samples  # noqa: E402
from simpo_megatron.training.start.setup import build_trainer  # noqa: E402
from simpo_megatron.training.step import (  # noqa: E402
    Trainer,
    batch_options,
    reduce_sums,
    train_step,
)


class ListDataset:
    """Pairs held in memory, as a dataset; a token of context is written as its complement."""

    def __init__(self, pairs: list) -> None:
        self.pairs = [TokenizedPair.from_marked(*(np.asarray(ids, dtype=np.int32) for ids in pair)) for pair in pairs]
        self.reference_avg = None
        self.lengths = np.array([[len(ids) for ids in pair] for pair in pairs], dtype=np.int32)
        self.counted = np.array([[sum(token >= 0 for token in ids) for ids in pair[1:]] for pair in pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedPair:
        return self.pairs[index]

    def places(self, indices: list[int], most: int) -> str:
        return f"memory:{list(indices)[:most]}"


def run(name: str, config: Config, job: dict, folder: Path) -> None:
    print(name, flush=True)
    description = describe_hf_model(job["model"])
    layout = resolve(
        config,
        world_size=int(os.environ["WORLD_SIZE"]),
        model=description.transformer,
        machine=device.machine(),
    )
    groups = parallel.initialize(config.parallel.sizes, backend="gloo", timeout_minutes=3)
    parallel.seed_everything(config.run.seed)
    bare = build_model(description, config, groups)
    load_hf_weights(bare, job["model"], description, tp_rank=groups.tp.rank(), tp_size=groups.tp.size())
    options = batch_options(config, layout, pad_id=0)
    trainer = build_trainer(bare, config, groups, layout, options, train_iters=job["num_steps"])
    dataset = ListDataset(job["pairs"])
    if config.objective.needs_reference:
        dataset.reference_avg = reference_log_probs(trainer, dataset)
    records = []
    for step in range(job["num_steps"]):
        plan = trainer.plan_step(dataset, step * config.batch.global_batch_size)
        computed, grad_norm, *_ = train_step(trainer, dataset, plan)
        norms: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(norms, grad_norm)
        # Each rank clips by its own: where they differ, replicas would no longer be the same.
        assert len(set(norms)) == 1, f"gradient norms differ over ranks: {norms}"
        metrics = reduce_sums(computed.sums, computed.num_pairs, groups)
        balance = computed.load_balancing_loss
        records.append({**metrics, "grad_norm": grad_norm, "load_balancing_loss": balance})
    if "prompts" in job:
        samples = greedy_samples(trainer, job["prompts"], num_tokens=8, end_ids=(), vocab_size=description.vocab_size)
        (folder / f"{name}.samples{torch.distributed.get_rank()}.json").write_text(json.dumps(samples))
    gather_parameters(trainer.chunks)
    export_hf(bare, description, job["model"], folder / name, groups=groups, dtype=torch.float32)
    if torch.distributed.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(records))
    if name in job["poisoned"]:
        refuse_a_step_that_is_not_finite(trainer, dataset, bare)


def refuse_a_step_that_is_not_finite(trainer: Trainer, dataset: ListDataset, bare: list) -> None:
    """One weight of one rank becomes NaN: every rank raises, and no weight, moment or learning rate has moved."""
    if torch.distributed.get_rank() == 1:
        bare[0].decoder.layers[0].mlp.linear_fc2.weight.data.view(-1)[3] = float("nan")
    before = [parameter.detach().clone() for chunk in bare for parameter in chunk.parameters()]
    num_steps = trainer.scheduler.num_steps
    try:
        train_step(trainer, dataset, trainer.plan_step(dataset, 0))
    except NumericsError as error:
        assert "found nan" in str(error), error
    else:
        raise AssertionError("a step whose gradient is NaN was taken")
    after = [parameter.detach() for chunk in bare for parameter in chunk.parameters()]
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True))
    assert trainer.scheduler.num_steps == num_steps


if __name__ == "__main__":
    for target in map(Path, sys.argv[1:]):
        the_job = json.loads((target / "job.json").read_text())
        for layout_name, options in the_job["layouts"].items():
            run(layout_name, config_from(**{**the_job["options"], **options}), the_job, target)
            leave_groups()
    torch.distributed.destroy_process_group()
