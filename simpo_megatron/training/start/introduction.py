"""The first lines of a run: model, data, layout, steps, and warnings."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from simpo_megatron.config import Config, changed_options, lint, to_text
from simpo_megatron.convert import trained_share
from simpo_megatron.data import padding_share
from simpo_megatron.data.inspection import num_leaked, read_as, summary
from simpo_megatron.mcore import device
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.layers import load_balancing_coefficient, times_transformers
from simpo_megatron.reporting.loggers import RunLog
from simpo_megatron.training.start.environment import prepare_environment
from simpo_megatron.training.start.setup import Job


def introduce(config: Config, job: Job, notes: Sequence[str], log: RunLog, told: set[str]) -> None:
    """Print the first lines of a run, but those that are in `told`, to which it adds them.

    The options are not printed again at all: a later run of a session is a trial whose name says what differs.
    """
    if config.run.verbose or not told:
        log.say(to_text(config) if config.run.verbose else f"options   {changed_options(config)}")
    lines = [*(f"WARNING {warning}" for warning in lint(config)), *describe_job(config, job), *notes]
    if variables := prepare_environment(config):
        lines.append("variables " + " ".join(f"{name}={value}" for name, value in variables.items()))
    for line in lines:
        if line not in told:
            log.say(line)
    told.update(lines)


def describe_job(config: Config, job: Job) -> list[str]:
    """Lines on the model, the pairs, the ranks and the steps."""
    description, sizes = job.plan.description, config.parallel.sizes
    shape = description.transformer
    vocabulary = f"{description.vocab_size} ids"
    padded = job.trainer.chunks[0].module.vocab_size
    if padded != description.vocab_size:
        vocabulary += f" padded to {padded} for tp {sizes.tensor} (padding is masked out of the softmax)"
    validation = [f"{len(dataset):,} for validation {name}".strip() for name, dataset in job.valid_data.items()]
    batch = job.trainer.batch_options
    return [
        f"model     {description.family} from {' + '.join(map(str, job.plan.sources.folders))}: "
        f"{shape['num_layers']} layers, hidden {shape['hidden_size']}, {vocabulary}" + _left_out(description),
        f"trained   {trained_share(description, config.lora)}",
        f"objective {config.objective.title}: {config.objective.describe()}",
        f"pairs     {len(job.train_data):,} to train on, "
        + (", ".join(validation) or "none for validation to tell whether it learns"),
        *_describe_template(job),
        *_describe_files(job),
        *_load_balancing(config, job),
        f"ranks     {dist.get_world_size()} ({device.backend()}): tp {sizes.tensor} x pp {sizes.pipeline} x cp "
        f"{sizes.context} x dp {job.plan.layout.data_parallel_size}"
        + (f", experts over {sizes.expert}" if "num_moe_experts" in shape else "")
        + f"; {device.kernels(bf16=config.precision.bf16)}",
        f"steps     {job.train_iters:,}, of {batch.global_batch_size} pairs each" + _padding(job),
    ]


def _left_out(description: ModelDescription) -> str:
    """The end of a line on the layers of a model that are neither trained nor exported."""
    number = description.hf_config.get("num_nextn_predict_layers")
    return f"; without its {number} that predict{'s' * (number == 1)} further tokens" if number else ""


def _load_balancing(config: Config, job: Job) -> list[str]:
    """A line on an MoE's load-balancing loss, on transformers' scale too; none for a dense model."""
    description, asked = job.plan.description, config.model.moe_aux_loss_coeff
    if "num_moe_experts" not in description.transformer:
        return []
    times, coefficient = times_transformers(description), load_balancing_coefficient(description, asked)
    scale = f"a coefficient is {times:g} times as strong here as router_aux_loss_coef in transformers"
    if asked is None and not coefficient:
        return [
            "WARNING   load balancing: none, as output_router_logits is not set in config.json, and as transformers' "
            f"trainers have it; --moe-aux-loss-coeff X adds it ({scale})"
        ]
    return [f"balance   coefficient {coefficient:g} a layer, router_aux_loss_coef {coefficient * times:g}: {scale}"]


def _padding(job: Job) -> str:
    """A line on the padding that one length for all packs costs, where there is one."""
    batch, layout = job.trainer.batch_options, job.plan.layout
    if not (batch.one_shape_per_step or batch.fixed_pack_length):
        return ""
    share = padding_share(
        job.train_data.lengths,
        batch,
        dp_size=layout.data_parallel_size,
        microbatch_multiple=layout.microbatch_multiple,
    )
    of = f"{batch.tokens_per_microbatch:,} tokens" if batch.fixed_pack_length else "one length a step"
    return f"; microbatches are padded to {of}, {share:.1%} of all tokens"


def _describe_template(job: Job) -> list[str]:
    if not job.tokenizer.facts.lacks_template:
        return []
    return [
        "WARNING   chat_template: found none in the tokenizer, so prompt and response are joined as they are; give one "
        "by --chat-template, or none if this is meant"
    ]


def _describe_files(job: Job) -> list[str]:
    """The records of the preference files that were read, and the leakage of training prompts into validation sets."""
    lines = read_as(job.train_data) + summary(job.train_data)
    for name, dataset in job.valid_data.items():
        if job.plan.sources.valid and dataset.report.extra_texts:
            lines += read_as(dataset, f"validation {name}".strip() + " ")
        if job.plan.sources.valid and (dataset.report.dropped or dataset.lost.any()):
            lines += summary(dataset, f"validation {name}".strip() + " ")
        if leaked := num_leaked(job.train_data, dataset):
            pairs = " ".join(f"{len(dataset):,} validation pairs {name}".split())
            lines.append(f"WARNING   leakage: {leaked:,} of {pairs} share a prompt with the training set")
    return lines
