"""From a configuration to the pieces of a run: data, model with its weights, optimizer, on this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from simpo_megatron.checkpoint.fingerprint import require_bases
from simpo_megatron.checkpoint.initial_weights import fill_adapters, fill_model
from simpo_megatron.collector import release_memory
from simpo_megatron.config import Config, Layout, num_train_iters, steps_between_evaluations
from simpo_megatron.data import (
    BatchOptions,
    PreferenceDataset,
    build_preference_dataset,
    check_batches,
    check_vocabulary,
    split,
)
from simpo_megatron.mcore.lora import redraw_adapters
from simpo_megatron.mcore.model import PreferenceGPTModel, build_model, wrap_in_ddp, zero_weights
from simpo_megatron.mcore.optimizer import build_optimizer, forget_optimizer, gather_parameters
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import build_on_first_ranks, raise_on_all_ranks
from simpo_megatron.training.start.inputs import Sources, cache_folder, hashes_file
from simpo_megatron.training.start.run_plan import RunPlan
from simpo_megatron.training.start.run_tokenizer import RunTokenizer, share_tokenizer
from simpo_megatron.training.start.start_times import end_phase
from simpo_megatron.training.step import Trainer, batch_options


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, ready to step."""

    plan: RunPlan
    tokenizer: RunTokenizer
    train_data: PreferenceDataset
    valid_data: Mapping[str, PreferenceDataset]
    """Validation pairs by the name of their set, "" for the only one that has none; the best checkpoint, the curves and
    the result are told by the first."""
    model: list[PreferenceGPTModel]
    trainer: Trainer
    train_iters: int
    eval_interval: int | None
    """Steps between evaluations."""
    chat_template: str | None = None
    """The text of the template that pairs were rendered with, where it is not the tokenizer's own."""
    reference_model: str | None = None
    """Fingerprint of the initial model, where the pairs hold what it says of them."""


@dataclass(frozen=True, kw_only=True)
class WarmPieces:
    """The pieces of a run that a next one of the same model, pairs and layout takes over."""

    tokenizer: RunTokenizer
    train_data: PreferenceDataset
    valid_data: Mapping[str, PreferenceDataset]
    model: list[PreferenceGPTModel]
    chunks: list[DistributedDataParallel]
    buffers: Sequence[Mapping[str, Tensor]]
    """The buffers of each chunk, as they were when it was built."""


def load_data(
    config: Config, sources: Sources, tokenizer: RunTokenizer
) -> tuple[PreferenceDataset, dict[str, PreferenceDataset]]:
    """(training pairs, validation pairs by the name of their set), tokenised unless the cache has them.

    Rank 0 tokenises first, then the first rank of each node that does not see rank 0's cache.

    Collectives: those of `build_on_first_ranks` for each set of files.
    """
    cache = cache_folder(config) / "pairs"

    def load(files: Sequence[str]) -> PreferenceDataset:
        return build_on_first_ranks(
            lambda build: build_preference_dataset(
                files,
                tokenizer.loaded if build else None,
                config.pairs,
                cache,
                build=build,
                # A rank that may tokenise, on another machine, goes by the files that it has.
                tokenizer_digest=(tokenizer.own_facts if build else tokenizer.facts).digest,
            )
        )

    train_data = load(sources.train)
    if sources.valid:
        return train_data, {name: load(files) for name, files in sources.valid.items()}
    if config.data.valid_fraction:
        train_data, validation = split(train_data, config.data.valid_fraction, config.run.seed)
        return train_data, {"": validation}
    return train_data, {}


def build_job(
    config: Config,
    plan: RunPlan,
    groups: ParallelGroups,
    *,
    load_weights: bool = True,
    warm: WarmPieces | None = None,
) -> Job:
    """The pieces of the run on this rank, before training; weights are the model's, or zeros that a resume fills.

    With adapters, weights are always the model's: a checkpoint holds only the adapters.

    Args:
        warm: pieces of a previous run, whose model and pairs this run reuses. Weights are loaded again; moments,
            schedule and objective are new. So the run is bit-identical to one without `warm`.

    Raises:
        ConfigError, DataError, CheckpointError: on every rank alike, before the first step.
    """
    sources, description, layout = plan.sources, plan.description, plan.layout
    if warm is None:
        tokenizer = share_tokenizer(sources.tokenizer, config.pairs)
        train_data, valid_data = load_data(config, sources, tokenizer)
    else:
        tokenizer, train_data, valid_data = warm.tokenizer, warm.train_data, dict(warm.valid_data)
    options = batch_options(config, layout, tokenizer.facts.pad_id)
    for dataset in (train_data, *valid_data.values()):
        check_vocabulary(dataset, description.vocab_size)
    train_iters = num_train_iters(config, len(train_data))
    check_batches(
        train_data.lengths,
        options,
        dp_size=layout.data_parallel_size,
        microbatch_multiple=layout.microbatch_multiple,
    )
    end_phase("data")

    if warm is None:
        model, chunks = build_model(description, config, groups), None
    else:
        model, chunks = warm.model, warm.chunks
        _forget_run(warm, config)
    end_phase("model")
    if load_weights or config.lora.lora_rank is not None:
        fill_initial_weights(model, plan, groups)
    else:
        zero_weights(model)
    end_phase("weights")
    trainer = build_trainer(model, config, groups, layout, options, train_iters=train_iters, chunks=chunks)
    end_phase("optimizer")
    return Job(
        plan=plan,
        tokenizer=tokenizer,
        train_data=train_data,
        valid_data=valid_data,
        model=model,
        trainer=trainer,
        train_iters=train_iters,
        eval_interval=steps_between_evaluations(config, len(train_data)),
        chat_template=tokenizer.facts.chat_template,
    )


def fill_initial_weights(model: list[PreferenceGPTModel], plan: RunPlan, groups: ParallelGroups) -> None:
    """Fill the weights of this rank's `model`, and the adapters that go on training, where there are some.

    Collectives: those of `fill_model`, `fill_adapters` and `raise_on_all_ranks`, world.

    Raises: as they; CheckpointError, too, on every rank alike, when a run's adapters were trained on another model.
    """
    sources, memory = plan.sources, hashes_file(plan.config)
    together = replace(sources.model_source, adapters=sources.folders[1:])
    raise_on_all_ranks(lambda: require_bases(together, memory) if dist.get_rank() == 0 else None)
    fill_model(model, plan.sources.model_source, plan.description, groups)
    if plan.sources.adapter is not None:
        fill_adapters(model, plan.sources.adapter, plan.description, groups)


def warm_pieces(job: Job) -> WarmPieces:
    """The pieces of `job` that a next run may reuse."""
    return WarmPieces(
        tokenizer=job.tokenizer,
        train_data=job.train_data,
        valid_data=job.valid_data,
        model=job.model,
        chunks=job.trainer.chunks,
        buffers=[{name: buffer.clone() for name, buffer in chunk.named_buffers()} for chunk in job.model],
    )


def _forget_run(warm: WarmPieces, config: Config) -> None:
    """Reset the previous run's state in the model, except weights that a loader fills; re-initialise adapters.

    Collectives: those of `gather_parameters`, which finishes a gather that a stopped run has started.
    """
    gather_parameters(warm.chunks)
    forget_optimizer(warm.chunks)
    release_memory()
    for chunk, buffers in zip(warm.model, warm.buffers, strict=True):
        for name, buffer in chunk.named_buffers():
            buffer.copy_(buffers[name])
        if config.lora.lora_rank is not None:
            redraw_adapters(chunk, config.lora, seed=config.run.seed)


def build_trainer(
    model: list[PreferenceGPTModel],
    config: Config,
    groups: ParallelGroups,
    layout: Layout,
    options: BatchOptions,
    *,
    train_iters: int,
    chunks: list[DistributedDataParallel] | None = None,
) -> Trainer:
    """The trainer of this rank's `model`: megatron's DDP around it, optimizer and schedule of `train_iters` steps.

    Args:
        chunks: the model, if it is already under DDP.
    """
    chunks = wrap_in_ddp(model, config) if chunks is None else chunks
    optimizer, scheduler = build_optimizer(chunks, config, train_iters)
    return Trainer(
        groups=groups,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        objective=config.objective,
        batch_options=options,
        layout=layout,
    )
