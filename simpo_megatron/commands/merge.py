"""Averages models that differ only in their weights, such as a SimPO and a DPO run from the same start.

simpo merge OUT runs/simpo/hf runs/dpo/hf
simpo merge OUT runs/simpo runs/dpo --shares 0.7 0.3

Each model is a Hugging Face folder, a Megatron checkpoint, or a run's folder, whose newest checkpoint is used. A PEFT
folder, or a run of adapters, is the model that they make of their base. OUT becomes a Hugging Face folder with the
dtype, configuration and tokenizer of the first model. Models that differ in architecture, shapes or tokenizer are
refused. Sums are fp32, one tensor at a time; OUT appears only when it is whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.errors import visible
from simpo_megatron.offline.command import run_command

if TYPE_CHECKING:
    from simpo_megatron.parallel import ParallelGroups


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="Hugging Face folder to write")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="models to average, two or more")
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="S", help="weight of each model in the average, default equal"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str], prog: str = "simpo merge") -> int:
    """The exit code: 0, or that of the error, which is printed."""
    arguments = parse_arguments(argv, prog)
    return run_command(lambda groups: average(arguments, groups))


def average(arguments: argparse.Namespace, groups: ParallelGroups) -> int:
    """0, after the output was written."""
    from simpo_megatron.offline.merge import merge
    from simpo_megatron.offline.weights import open_weights

    models = [open_weights(path, groups) for path in arguments.models]
    shares = arguments.shares or [1.0] * len(models)
    merge(models, shares, arguments.out)
    parts = " + ".join(f"{share / sum(shares):.3g} x {model.named}" for share, model in zip(shares, models))
    print(visible(f"{arguments.out} = {parts}"))
    return 0
