"""A survey as text tables, and the chosen layout as YAML and launch commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import yaml
from rich.table import Table

from simpo_megatron.config import Config
from simpo_megatron.planning.gpus import ASSUMED, GIB
from simpo_megatron.planning.layouts import Candidate, PlanRequest, Refusal, Survey, layout_name, recomputation
from simpo_megatron.planning.memory import StageMemory
from simpo_megatron.planning.shapes import ModelShape
from simpo_megatron.planning.speed import StepTime


def describe_job(job: PlanRequest) -> list[str]:
    """The subject of the plan, a line each."""
    pack, precision, num_pairs = job.pack, job.config.precision, job.config.batch.global_batch_size
    shape = ModelShape.of(job.description)
    over = "with FP8 weights" if precision.fp8_param_gather else "over bf16"
    format_ = f"FP8 {precision.fp8_recipe} {over}" if precision.fp8_recipe else "bf16" if precision.bf16 else "fp32"
    experts = ""
    if shape.num_moe_experts:
        experts = f", {shape.num_active_parameters / 1e9:.1f} for a token: {shape.moe_router_topk} of "
        experts += f"{shape.num_moe_experts} experts a layer"
    return [
        f"model     {job.description.family}: {shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary "
        f"{shape.vocab_size:,}, {_in_words(shape.num_parameters)} parameters{experts}",
        f"GPUs      {job.num_gpus} x {job.gpu.memory_gib:.1f} GiB, {job.gpu.per_node} a node",
        f"step      {num_pairs} pairs of {pack.prompt:.4g} prompt and 2 x {pack.response:.4g} response tokens: "
        f"{num_pairs * pack.pair_tokens:,.0f} tokens, prompts {'once' if pack.prefix_sharing else 'twice'}, "
        f"in {_microbatches(job)}",
        f"format    {format_}; gradients and sums in fp32",
    ]


def _in_words(number: float) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,.0f}"


def _microbatches(job: PlanRequest) -> str:
    if job.largest is None:
        return f"packs of up to {job.pack.tokens:,}"
    return f"microbatches of up to {job.config.batch.micro_batch_size} pairs, {job.largest.tokens:,} tokens the largest"


def layouts_table(candidates: Iterable[Candidate]) -> Table:
    """One row a layout: recomputation, microbatches, memory of the fullest rank, speed."""
    table = Table(title="layouts that fit, fastest first", title_justify="left")
    table.add_column("layout", no_wrap=True)
    for heading in ("dp", "recompute"):
        table.add_column(heading)
    for heading in ("micro-\nbatches", "GiB", "bubble", "s/step", "tokens/s", "MFU"):
        table.add_column(heading, justify="right")
    for candidate in candidates:
        load, time = candidate.load, candidate.time
        table.add_row(
            layout_name(candidate.config),
            str(load.data_parallel_size),
            recomputation(candidate.config).removesuffix(" recomputed"),
            str(load.num_microbatches),
            f"{candidate.fullest.total / GIB:.1f}",
            f"{time.bubble / time.total:.0%}",
            f"{time.total:.2f}",
            f"{candidate.tokens_per_second:,.0f}",
            f"{candidate.utilization:.0%}",
        )
    return table


def memory_table(candidate: Candidate) -> Table:
    """GiB by part on a rank of each pipeline stage."""
    table = Table(title=f"GiB a GPU, {layout_name(candidate.config)}", title_justify="left")
    table.add_column("stage", justify="right")
    for part in fields(StageMemory):
        table.add_column(part.name, justify="right")
    table.add_column("total", justify="right")
    for stage, memory in enumerate(candidate.memory):
        values = [getattr(memory, part.name) for part in fields(StageMemory)] + [memory.total]
        table.add_row(str(stage), *(f"{value / GIB:.2f}" for value in values))
    return table


def time_line(candidate: Candidate) -> str:
    """Seconds of a step by part, the parts that take any."""
    time = candidate.time
    parts = [(part.name, getattr(time, part.name)) for part in fields(StepTime)]
    shown = ", ".join(f"{name.replace('_', ' ')} {seconds:.2f}" for name, seconds in parts if seconds > 0.005)
    return f"a step of {time.total:.2f} s: {shown}"


def run_line(candidate: Candidate, num_steps: int, num_trials: int = 1) -> str:
    """Hours, GPU-hours and tokens of `num_steps` steps, as often as there are trials one after the other."""
    tokens = num_steps * candidate.tokens_per_step
    hours = num_steps * candidate.time.total / 3600
    one = f"{num_steps:,} steps: {_cost(candidate, hours)}, {_in_words(tokens)} tokens"
    if num_trials == 1:
        return f"the run: {one}"
    return f"a run of {one}; {num_trials} trials in turn: {_cost(candidate, num_trials * hours)}"


def _cost(candidate: Candidate, hours: float) -> str:
    time = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
    return f"{time}, {hours * candidate.num_gpus:,.1f} GPU-hours"


def refusals_table(refusals: Iterable[Refusal]) -> Table:
    """The layouts that cannot be run, grouped by reason; of those that need too much memory, the smallest."""
    table = Table(title="layouts that cannot be run", title_justify="left")
    table.add_column("layouts", ratio=1)
    table.add_column("reason", ratio=3)
    groups: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        too_large = re.split(" (?:ep|vpp) ", refusal.name)[0]
        groups.setdefault(too_large if refusal.too_many_bytes else refusal.reason, []).append(refusal)
    for group in groups.values():
        first = min(group, key=lambda refusal: refusal.too_many_bytes)
        others = f" and {len(group) - 1} more" if len(group) > 1 else ""
        table.add_row(first.name + others, first.reason)
    return table


def assumptions() -> list[str]:
    """The assumptions behind the figures."""
    return [
        "memory: full packs, mean pairs (without packing: pairs of max_length), experts equally loaded; weights, "
        "gradients and optimizer as megatron-core allocates them (tested), activations as Transformer Engine's layers "
        "keep them, 1 GiB and 0.3 GiB for each kind of group for CUDA and NCCL; "
        f"{ASSUMED.usable_memory:.0%} of a GPU is usable",
        f"speed: matrix products at {ASSUMED.bf16:.0%} of the bf16 and {ASSUMED.fp8:.0%} of the FP8 rate, attention at "
        f"{ASSUMED.attention:.0%}, links at {ASSUMED.links:.0%}, memory at {ASSUMED.elementwise:.0%}; packs of a "
        f"pipeline padded by {ASSUMED.padding:.0%}; tensor-parallel collectives not overlapped, with --tp-comm-overlap "
        f"{ASSUMED.tensor_overlap:.0%} of them. An estimate to compare layouts by; nothing here was measured on a GPU",
    ]


def run_yaml(candidate: Candidate, heading: str) -> str:
    """The trainer's YAML: `heading` as comments, then every option that is not its default.

    The model's folder and the preference files are left to the command line; options that a preset sets are repeated.
    """
    comments = "".join(f"# {line}\n" for line in heading.splitlines())
    defaults = asdict(Config())
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for section, values in asdict(candidate.config).items()
        for name, value in values.items()
        if name not in ("model", "data") and value != defaults[section].get(name)
    }
    return comments + yaml.safe_dump(options, sort_keys=False, width=110)


def launch_commands(candidate: Candidate, config_file: str, model: str) -> dict[str, str]:
    """The commands that start the run, by the place to type them.

    A `model` that is a name and no folder becomes MODEL_DIR; MODEL_DIR, PAIRS and HOST are for the reader to fill in.
    """
    per_node = min(candidate.gpu.per_node, candidate.num_gpus)
    num_nodes = -(-candidate.num_gpus // per_node)
    folder = model if Path(model).is_dir() else "MODEL_DIR"
    options = shlex.join(["--config", config_file, "--model", folder, "--data", "PAIRS"])
    training = f"--nproc-per-node {per_node} -m simpo_megatron train {options}"
    if num_nodes == 1:
        return {"on the node": f"torchrun --standalone {training}"}
    meeting = f"--rdzv-backend c10d --rdzv-endpoint HOST:29500 --nnodes {num_nodes}"
    return {
        "on each node": f"torchrun {meeting} {training}",
        "or once, under Slurm": f"sbatch --nodes {num_nodes} examples/launch/slurm.sbatch {options}",
    }


def summarize(survey: Survey, best: Candidate) -> str:
    """The recommendation in one line."""
    refused = f", {len(survey.refusals)} do not (--why-not tells why)" if survey.refusals else ""
    return (
        f"recommended: {layout_name(best.config)}, dp {best.load.data_parallel_size}, "
        f"{recomputation(best.config)}: {best.fullest.total / GIB:.1f} GiB on the fullest GPU, "
        f"{best.tokens_per_second:,.0f} tokens/s, most memory left within {ASSUMED.speed_error:.0%} of the fastest; "
        f"{len(survey.candidates)} layouts fit{refused}"
    )
