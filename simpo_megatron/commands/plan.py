"""Plans a run before GPUs are rented: layouts that fit, their memory, expected speed, and commands to start them.

simpo plan --model Llama-3.1-70B --gpus 64 --gpu h100-80gb --tokens-per-microbatch 8192 --fp8 tensorwise
simpo plan --model DIR --gpus 8 --preset llama3-instruct-v0.2 --write runs/plan.yaml
simpo plan --model llama3-instruct --gpus 8 --config llama3_8b_instruct_8xh100 --as-is
simpo plan --model DIR --gpus 8 --data pairs.jsonl --trials 6     # lengths and steps of your pairs, hours, GPU-hours

--model takes a Hugging Face folder, a config.json, a published model or the name of a preset. Every option of the
trainer may follow, and its YAML files too; sizes above 1 (--tp 8 --pp 4 ...) are kept, the others are searched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.config import Config, load_config
from simpo_megatron.errors import ConfigError, SimPOError, report_error
from simpo_megatron.planning.gpus import GPUS, PROMPT_TOKENS, RESPONSE_TOKENS


def parse_arguments(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """The planner's own options and, untouched, those of the trainer."""
    parser = CommandParser(prog, __doc__, takes_trainer_options=True)
    parser.add_argument("--model", required=True, metavar="NAME", help="folder, config.json, published name or preset")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="number of GPUs on all nodes together")
    parser.add_argument("--gpu", default="h100-80gb", choices=sorted(GPUS), help="kind of GPU, default h100-80gb")
    parser.add_argument(
        "--data", nargs="+", action="extend", metavar="FILE", help="plan for the lengths and the number of these pairs"
    )
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="number of runs to cost, default 1")
    parser.add_argument(
        "--prompt-tokens", type=float, metavar="N", help=f"mean length of a prompt, default {PROMPT_TOKENS}"
    )
    parser.add_argument(
        "--response-tokens",
        type=float,
        metavar="N",
        help=f"mean length of one response, default {RESPONSE_TOKENS}; --data takes both from your pairs",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to list, default 10")
    parser.add_argument("--why-not", action="store_true", help="also print why other layouts do not fit")
    parser.add_argument("--as-is", action="store_true", help="plan the layout of --config, without a search")
    parser.add_argument("--write", metavar="FILE", help="write the recommended layout as YAML for simpo train")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str], prog: str = "simpo plan") -> int:
    """The exit code: 0 with a plan, 2 when nothing fits or the options are wrong."""
    arguments, of_the_trainer = parse_arguments(argv, prog)
    console = Console(width=120, soft_wrap=False) if not sys.stdout.isatty() else Console()
    try:
        config = _config(arguments, of_the_trainer)
        # Only now: with the loss and the models that it plans, the planner loads torch.
        from simpo_megatron.planning.answer import print_plan

        print_plan(arguments, of_the_trainer, config, console)
    except SimPOError as error:
        return report_error(error)
    return 0


def _config(arguments: argparse.Namespace, of_the_trainer: list[str]) -> Config:
    for name in ("gpus", "prompt_tokens", "response_tokens", "trials"):
        found = getattr(arguments, name)
        if found is not None and found <= 0:
            raise ConfigError(f"{name}: found {found:g}, expected a number above 0")
    argv = [*of_the_trainer, "--model", arguments.model, "--data", *(arguments.data or ["pairs.jsonl"])]
    config = load_config(argv)
    if config.lora.adapter is None:
        return config
    from simpo_megatron.planning.models import find_model
    from simpo_megatron.training.start.run_plan import with_adapter_of

    return with_adapter_of(config, config.lora.adapter, find_model(arguments.model))
