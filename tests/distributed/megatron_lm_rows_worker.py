"""Train by the hooks for Megatron-LM under megatron-core's schedules, as its `pretrain()` calls both.

`megatron_lm_rows_worker.py FOLDER`: job.json holds the model folder, the pairs, Megatron-LM's arguments and the
layouts. A layout leaves <name>.json (loss, load-balancing loss and gradient norm of each step) and <name>/ (the trained
weights, fp32). Megatron-LM itself, which not every megatron-core has, is replaced by its parsed arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

import torch  # noqa: E402
from layout_worker import ListDataset  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func, p2p_communication  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from ranks import leave_groups  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.config import config_from  # noqa: E402
from simpo_megatron.convert import export_hf, load_hf_weights  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model, padded_vocab_size  # noqa: E402
from simpo_megatron.mcore.model import transformer_config, wrap_in_ddp  # noqa: E402
from simpo_megatron.mcore.optimizer import build_optimizer, update, zero_gradients  # noqa: E402
from simpo_megatron.megatron_lm import add_simpo_args, forward_step, model_provider  # noqa: E402
from simpo_megatron.megatron_lm.arguments import batch_options, num_microbatches  # noqa: E402
from simpo_megatron.megatron_lm.datasets import Division, _samples  # noqa: E402


def stand_in_for_megatron_lm(args: argparse.Namespace, core_config) -> None:
    """megatron.training with `args`, from which a config with the settings of its own comes."""
    training, arguments = ModuleType("megatron.training"), ModuleType("megatron.training.arguments")
    training.get_args, training.get_tokenizer = lambda: args, None
    core_config.perform_initialization = True  # marks divided weights
    core_config.deallocate_pipeline_outputs = True
    arguments.core_transformer_config_from_args = lambda args, kind: core_config
    sys.modules |= {training.__name__: training, arguments.__name__: arguments}


def refuse_exchanged_shapes() -> None:
    def exchange(*_, **__):
        raise AssertionError("a pipeline stage asked for a shape")

    p2p_communication.P2PCommunicator._communicate_shapes = exchange


def balance_logged() -> list[float]:
    """The losses of each layer here that megatron's own log has recorded since the last call."""
    tracked = getattr(moe_utils, "get_moe_layer_wise_logging_tracker", None)
    if tracked is None:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        values = get_moe_metrics_tracker().metrics["load_balancing_loss"].values
    else:
        values = tracked()["load_balancing_loss"]["values"]
    layers = values.tolist()
    values.zero_()
    return layers


def run(name: str, layout: dict, job: dict, folder: Path) -> None:
    print(name, flush=True)
    config, description = config_from(**job["options"], **layout), describe_hf_model(job["model"])
    sizes = config.parallel.sizes
    groups = parallel.initialize(sizes, backend="gloo", timeout_minutes=3)
    parallel.seed_everything(config.run.seed)
    args = add_simpo_args(argparse.ArgumentParser()).parse_args(job["flags"])
    gpt = description.gpt
    vars(args).update(
        job["megatron"],
        data_parallel_size=groups.dp.size(),
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        sequence_parallel=config.parallel.sequence_parallel,
        vocab_size=description.vocab_size,
        padded_vocab_size=padded_vocab_size(description.vocab_size, sizes.tensor),
        untie_embeddings_and_output_weights=not gpt["share_embeddings_and_output_weights"],
        rotary_base=gpt["rotary_base"],
    )
    stand_in_for_megatron_lm(args, transformer_config(description, config))
    num_chunks = sizes.virtual_pipeline or 1
    bare = [
        model_provider(
            groups.is_first_stage and stage == 0,
            groups.is_last_stage and stage == num_chunks - 1,
            stage if num_chunks > 1 else None,
        )
        for stage in range(num_chunks)
    ]
    load_hf_weights(bare, job["model"], description, tp_rank=groups.tp.rank(), tp_size=groups.tp.size())
    chunks = wrap_in_ddp(bare, config)
    optimizer, scheduler = build_optimizer(chunks, config, job["num_steps"])
    dataset, options = ListDataset(job["pairs"]), batch_options(args)
    division = Division(options, dp_size=groups.dp.size(), num_microbatches=num_microbatches(args))
    division.check(dataset.lengths, 0, job["num_steps"])
    samples = [_samples(dataset, division, dp_rank=groups.dp.rank(), consumed_pairs=0) for _ in chunks]
    records = []
    for _ in range(job["num_steps"]):
        zero_gradients(chunks, optimizer)
        kept = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=samples,
            model=chunks,
            num_microbatches=division.num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        grad_norm, _ = update(optimizer, scheduler)
        # [loss summed over pairs, pairs, the layers' load-balancing losses summed over microbatches]
        loss = sum((metrics["loss"] for metrics in kept), torch.zeros(2)).double() / groups.tp.size()
        sums = torch.tensor([*loss.tolist(), sum(balance_logged())], dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        balance = sums[2] / (len(division.plan(dataset.lengths, 0)) * division.num_microbatches)
        records.append([float(sums[0] / sums[1]), float(balance / description.transformer["num_layers"]), grad_norm])
    export_hf(bare, description, job["model"], folder / name, groups=groups, dtype=torch.float32)
    if torch.distributed.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    refuse_exchanged_shapes()
    target = Path(sys.argv[1])
    the_job = json.loads((target / "job.json").read_text())
    for layout_name, of_layout in the_job["layouts"].items():
        run(layout_name, of_layout, the_job, target)
        leave_groups()
    torch.distributed.destroy_process_group()
