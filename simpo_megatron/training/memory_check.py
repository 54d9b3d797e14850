"""The memory probe: runs the largest packs forward and backward before the first step, and restores all state."""

from __future__ import annotations

import torch
import torch.distributed as dist

from simpo_megatron.checkpoint.sharded_state import restore_rng, rng_states
from simpo_megatron.config import Config
from simpo_megatron.data import PreferenceDataset, plan_tokens
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import device
from simpo_megatron.mcore.optimizer import reserve_moments, zero_gradients
from simpo_megatron.training.saving import Start
from simpo_megatron.training.start.setup import Job
from simpo_megatron.training.step import StepPlan, Trainer, peak_memory_bytes, run_pass

_MAX_SHOWN = 8


def probe_memory(config: Config, job: Job, start: Start) -> list[str]:
    """A line on the peak memory of the steps after `start`; none where the probe is off.

    The step with the largest pack is computed as in training, with only as many microbatches as a pipeline holds at
    once. Afterwards weights, moments, schedule and random states are as before, and gradients are cleared. The
    memory that Adam allocates in its first update is added.

    Collectives: those of one forward and backward pass, and one all-reduce of 8 bytes, world.

    Raises:
        ConfigError: this rank ran out of memory. It alone raises: other ranks may still be in a collective.
    """
    if not config.monitors.probe_memory:
        return []
    if config.precision.fp8_recipe == "delayed":
        return ["memory    check skipped: delayed FP8 would record it in its amax history"]
    trainer, dataset = job.trainer, job.train_data
    number, plan = trainer.plan_heaviest(dataset, start.consumed_pairs, job.train_iters - start.iteration)
    sizes = plan_tokens(dataset.lengths, plan, trainer.batch_options)
    tokens, pack = max((tokens, pack) for (tokens, *_), (pack, *_) in zip(sizes, plan, strict=True))
    step = start.iteration + 1 + number
    shown = dataset.places(pack, _MAX_SHOWN)
    described = f"the largest pack of the run, {tokens:,} tokens in step {step:,} (pairs {shown})"
    try:
        _rehearse(trainer, dataset, _cut_to_what_is_held(trainer, plan))
    except Exception as error:
        if not device.is_out_of_memory(error):
            raise
        raise _too_large(described, config) from error
    peak = torch.tensor(peak_memory_bytes(), dtype=torch.int64, device=device.current_device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    available = device.memory_bytes() / 2**30
    return [f"memory    {described}, fits: {int(peak) / 2**30:.1f} of {available:.1f} GiB on the fullest rank"]


def _rehearse(trainer: Trainer, dataset: PreferenceDataset, plan: StepPlan) -> None:
    states = rng_states()
    moments = reserve_moments(trainer.optimizer)
    for chunk in trainer.chunks:
        chunk.train()
    zero_gradients(trainer.chunks, trainer.optimizer)
    run_pass(trainer, dataset, plan)
    zero_gradients(trainer.chunks, trainer.optimizer)
    del moments
    restore_rng(states)


def _cut_to_what_is_held(trainer: Trainer, plan: StepPlan) -> StepPlan:
    """The heaviest microbatches of each rank: as many as its schedule holds activations for at once."""
    sizes = trainer.groups.sizes
    num_held = sizes.pipeline * (2 if (sizes.virtual_pipeline or 1) > 1 else 1)
    return tuple(microbatches[:num_held] for microbatches in plan)


def _too_large(described: str, config: Config) -> ConfigError:
    key = "tokens_per_microbatch" if config.batch.packing else "micro_batch_size"
    return ConfigError(
        f"{key}: found {getattr(config.batch, key)}, but {described}, does not fit in the memory of rank "
        f"{dist.get_rank()} ({device.memory_bytes() / 2**30:.1f} GiB); lower it, or max_length if a pair alone is too "
        "long, or recompute activations with --recompute full"
    )
