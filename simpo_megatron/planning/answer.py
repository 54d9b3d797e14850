"""The answer of `simpo plan`: the pairs that it plans for, the layouts it finds, and how the best one is started."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from simpo_megatron.config import Config, num_train_iters
from simpo_megatron.data import build_preference_dataset, load_tokenizer, split
from simpo_megatron.errors import ConfigError, visible
from simpo_megatron.planning.gpus import GIB, GPUS, PROMPT_TOKENS, RESPONSE_TOKENS
from simpo_megatron.planning.layouts import (
    Candidate,
    PlanRequest,
    Survey,
    fewest_gpus,
    layout_name,
    plan_one,
    recomputation,
    survey,
)
from simpo_megatron.planning.models import find_model, source_of
from simpo_megatron.planning.shapes import Pack
from simpo_megatron.planning.tables import (
    assumptions,
    describe_job,
    launch_commands,
    layouts_table,
    memory_table,
    refusals_table,
    run_line,
    run_yaml,
    summarize,
    time_line,
)


@dataclass(frozen=True)
class _Pairs:
    """The pairs to plan for: mean lengths, and their number where files were named."""

    prompt: float
    response: float
    count: int | None = None


def print_plan(arguments: argparse.Namespace, of_the_trainer: list[str], config: Config, console: Console) -> None:
    """Print the plan of `config`, as the arguments of `simpo plan` ask for it.

    Raises: ConfigError when nothing fits, or the arguments contradict each other.
    """
    pairs = _pairs(arguments, config)
    job = _job(arguments, config, pairs)
    for line in (*describe_job(job), f"sizes     {source_of(arguments.model)}"):
        _say(line, console)
    best = plan_one(job) if arguments.as_is else _show(survey(job), arguments, console)
    _explain(best, arguments, pairs, _whole_config(arguments, of_the_trainer), console)


def _pairs(arguments: argparse.Namespace, config: Config) -> _Pairs:
    """Lengths and number of the pairs, by the files of --data or by --prompt-tokens and --response-tokens.

    Raises: ConfigError when both are given, or there is no tokenizer to measure the files with.
    """
    said = {"prompt_tokens": arguments.prompt_tokens, "response_tokens": arguments.response_tokens}
    if not arguments.data:
        return _Pairs(said["prompt_tokens"] or PROMPT_TOKENS, said["response_tokens"] or RESPONSE_TOKENS)
    for name, value in said.items():
        if value is not None:
            raise ConfigError(f"{name}: found {value:g} beside --data, expected one of them; the files have lengths")
    if not Path(arguments.model).is_dir():
        raise ConfigError(
            f"data: found {arguments.model!r} as the model, expected a folder with the tokenizer; name one, or give "
            "--prompt-tokens and --response-tokens, which `simpo inspect` tells"
        )
    with tempfile.TemporaryDirectory() as scratch:
        cache = config.data.data_cache or scratch
        pairs = build_preference_dataset(arguments.data, load_tokenizer(arguments.model), config.pairs, cache)
        if config.data.valid_fraction:
            pairs, _ = split(pairs, config.data.valid_fraction, config.run.seed)
        prompt, chosen, rejected = pairs.lengths.mean(axis=0)
        return _Pairs(float(prompt), float(chosen + rejected) / 2, len(pairs))


def _job(arguments: argparse.Namespace, config: Config, pairs: _Pairs) -> PlanRequest:
    description = find_model(arguments.model)
    prompt, response = pairs.prompt, pairs.response
    longest = config.pairs.max_length / (prompt + response)
    pairs_of = {"prompt": max(1.0, longest) * prompt, "response": max(1.0, longest) * response}
    return PlanRequest(
        description=description,
        config=config,
        num_gpus=arguments.gpus,
        gpu=GPUS[arguments.gpu],
        pack=Pack.of(config.batch, prompt=prompt, response=response),
        # Without packing, the longest microbatch has pairs of max_length only.
        largest=None if config.batch.packing else Pack.of(config.batch, **pairs_of),
    )


def _show(found: Survey, arguments: argparse.Namespace, console: Console) -> Candidate:
    if not found.candidates:
        num_gpus, sizes = found.job.num_gpus, found.job.config.parallel.sizes
        if not found.refusals:
            raise ConfigError(f"gpus: found {num_gpus}, expected a multiple of tp {sizes.tensor} x cp {sizes.context}")
        console.print(refusals_table(found.refusals))
        raise ConfigError(f"gpus: found {num_gpus}, and no layout fits; expected {_what_would_fit(found)}")
    console.print(layouts_table(found.candidates[: arguments.top]))
    if arguments.why_not and found.refusals:
        console.print(refusals_table(found.refusals))
    console.print(summarize(found, found.recommended), style="bold", highlight=False, soft_wrap=True)
    return found.recommended


def _what_would_fit(found: Survey) -> str:
    larger = fewest_gpus(found.job)
    if larger is None:
        return "smaller packs, --recompute full or LoRA"
    best = larger.recommended
    return (
        f"at least {larger.job.num_gpus} ({layout_name(best.config)}, {recomputation(best.config)}: "
        f"{best.fullest.total / GIB:.1f} GiB), smaller packs or LoRA"
    )


def _whole_config(arguments: argparse.Namespace, of_the_trainer: list[str]) -> str | None:
    """The YAML file that already holds the whole plan, if one does."""
    is_all = arguments.as_is and len(of_the_trainer) == 2 and of_the_trainer[0] == "--config"
    return of_the_trainer[1] if is_all else None


def _explain(
    best: Candidate, arguments: argparse.Namespace, pairs: _Pairs, config_file: str | None, console: Console
) -> None:
    console.print(memory_table(best))
    lines = [time_line(best)]
    if pairs.count is not None or best.config.optimizer.train_iters is not None:
        lines.append(run_line(best, num_train_iters(best.config, pairs.count or 0), arguments.trials))
    elif arguments.trials > 1:
        raise ConfigError(f"trials: found {arguments.trials}, expected --data FILE or --train-iters N to count steps")
    if pairs.count is None:
        lines.append("lengths: --data FILE takes those of your pairs, --prompt-tokens and --response-tokens say others")
    for line in (*lines, *assumptions()):
        _say(line, console)
    file = arguments.write or config_file or "plan.yaml"
    commands = launch_commands(best, file, arguments.model)
    heading = f"{arguments.model} on {arguments.gpus} {arguments.gpu}, planned and not measured."
    text = run_yaml(best, "\n".join([heading, *(f"  {command}" for command in commands.values())]))
    if arguments.write:
        Path(file).write_text(text, encoding="utf-8")
        _say(f"\nwrote {file}", console)
    elif config_file is None:
        _say(f"\n{file} (--write FILE writes it):\n\n{text}", console)
    for where, command in commands.items():
        _say(f"{where}:\n  {command}", console)


def _say(text: str, console: Console) -> None:
    """Print a text without wrapping lines, so that a command can be copied."""
    console.print(visible(text, keep="\n"), markup=False, highlight=False, soft_wrap=True)
