"""Plans a run before GPUs are rented: which layouts fit, what each needs, how fast it should be, how to start it.

simpo plan --model Llama-3.1-70B --gpus 64 --gpu h100-80gb --tokens-per-microbatch 8192 --fp8 tensorwise
simpo plan --model DIR --gpus 8 --preset llama3-instruct-v0.2 --write runs/plan.yaml
simpo plan --model llama3-instruct --gpus 8 --config llama3_8b_instruct_8xh100 --as-is

--model takes a Hugging Face folder, a config.json, a published model or the name of a preset. Every option of the
trainer may follow, and its YAML files too; sizes above 1 (--tp 8 --pp 4 ...) are kept, the others are searched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.config import load_config
from simpo_megatron.errors import ConfigError, SimPOError, report_error, visible
from simpo_megatron.planning.gpus import GPUS
from simpo_megatron.planning.layouts import Candidate, PlanRequest, Survey, plan_one, survey
from simpo_megatron.planning.models import find_model
from simpo_megatron.planning.shapes import Pack
from simpo_megatron.planning.tables import (
    assumptions,
    describe_job,
    launch_commands,
    layouts_table,
    memory_table,
    refusals_table,
    run_yaml,
    summarize,
    time_line,
)


def parse_arguments(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """The planner's own options and, untouched, those of the trainer."""
    parser = CommandParser(prog, __doc__, takes_trainer_options=True)
    parser.add_argument("--model", required=True, metavar="NAME", help="folder, config.json, published name or preset")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="how many GPUs, over all nodes")
    parser.add_argument("--gpu", default="h100-80gb", choices=sorted(GPUS), help="default h100-80gb")
    parser.add_argument(
        "--prompt-tokens", type=float, default=300, metavar="N", help="mean length of a prompt, default 300"
    )
    parser.add_argument(
        "--response-tokens",
        type=float,
        default=400,
        metavar="N",
        help="mean length of one response, default 400; `simpo inspect` tells both of your pairs",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to list, default 10")
    parser.add_argument("--why-not", action="store_true", help="also say of every other layout why it does not fit")
    parser.add_argument("--as-is", action="store_true", help="plan the layout of --config as it stands, search none")
    parser.add_argument("--write", metavar="FILE", help="write the trainer's YAML of the recommended layout to FILE")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str], prog: str = "simpo plan") -> int:
    """The exit code: 0 with a plan, 2 when nothing fits or the question cannot be answered."""
    arguments, of_the_trainer = parse_arguments(argv, prog)
    console = Console(width=120, soft_wrap=False) if not sys.stdout.isatty() else Console()
    try:
        job = _job(arguments, of_the_trainer)
        for line in describe_job(job):
            _say(line, console)
        if arguments.as_is:
            best = plan_one(job)
        else:
            found = survey(job)
            best = _show(found, arguments, console)
        _explain(best, arguments, _whole_config(arguments, of_the_trainer), console)
    except SimPOError as error:
        return report_error(error)
    return 0


def _job(arguments: argparse.Namespace, of_the_trainer: list[str]) -> PlanRequest:
    for name in ("gpus", "prompt_tokens", "response_tokens"):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"{name}: found {getattr(arguments, name):g}, expected a number above 0")
    description = find_model(arguments.model)
    config = load_config([*of_the_trainer, "--model", arguments.model, "--data", "pairs.jsonl"])
    prompt, response = arguments.prompt_tokens, arguments.response_tokens
    longest = config.pairs.max_length / (prompt + response)
    pairs_of = {"prompt": max(1.0, longest) * prompt, "response": max(1.0, longest) * response}
    return PlanRequest(
        description=description,
        config=config,
        num_gpus=arguments.gpus,
        gpu=GPUS[arguments.gpu],
        pack=Pack.of(config.batch, prompt=prompt, response=response),
        # Without packing a microbatch is as long as its pairs, and those of max_length come together.
        largest=None if config.batch.packing else Pack.of(config.batch, **pairs_of),
    )


def _show(found: Survey, arguments: argparse.Namespace, console: Console) -> Candidate:
    if not found.candidates:
        num_gpus, sizes = found.job.num_gpus, found.job.config.parallel.sizes
        if not found.refusals:
            raise ConfigError(f"gpus: found {num_gpus}, expected a multiple of tp {sizes.tensor} x cp {sizes.context}")
        console.print(refusals_table(found.refusals))
        raise ConfigError(f"gpus: found {num_gpus}, and no layout fits; expected more GPUs, smaller packs or LoRA")
    console.print(layouts_table(found.candidates[: arguments.top]))
    if arguments.why_not and found.refusals:
        console.print(refusals_table(found.refusals))
    console.print(summarize(found, found.recommended), style="bold", highlight=False, soft_wrap=True)
    return found.recommended


def _whole_config(arguments: argparse.Namespace, of_the_trainer: list[str]) -> str | None:
    """The YAML file that says all there is to the plan already, if one does."""
    is_all = arguments.as_is and len(of_the_trainer) == 2 and of_the_trainer[0] == "--config"
    return of_the_trainer[1] if is_all else None


def _explain(best: Candidate, arguments: argparse.Namespace, config_file: str | None, console: Console) -> None:
    console.print(memory_table(best))
    for line in (time_line(best), *assumptions()):
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
    """Print a text with no line broken, so that a command can be copied."""
    console.print(visible(text, keep="\n"), markup=False, highlight=False, soft_wrap=True)
