"""Converts between Hugging Face folders and Megatron checkpoints, tensor by tensor.

simpo convert hf-to-mcore Llama-3.1-8B checkpoints/llama    # writes checkpoints/llama/release
simpo convert mcore-to-hf runs/mine out                     # the newest checkpoint of a run
simpo convert mcore-to-hf runs/mine/iter_0000100 out --dtype stored
simpo convert mcore-to-hf runs/lora out                     # its adapters, added to their base model

A checkpoint keeps the stored dtypes; a Hugging Face folder is written in bfloat16, unless --dtype is given. With
`--dtype stored` a round trip keeps every bit.
Needs memory for three times the largest tensor (70B: 4.3 GiB measured), no GPU. The output appears when it is whole;
after a kill, the same command starts again cleanly.
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

DTYPES = ("bfloat16", "float16", "float32", "stored")


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog, __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = "Converts a Hugging Face folder to a Megatron checkpoint."
    to_mcore = commands.add_parser("hf-to-mcore", description=about, help=about)
    to_mcore.add_argument("source", type=Path, metavar="HF_FOLDER", help="folder to read")
    about = "Converts a Megatron checkpoint to a Hugging Face folder."
    to_hf = commands.add_parser("mcore-to-hf", description=about, help=about)
    to_hf.add_argument(
        "source", type=Path, metavar="CHECKPOINT", help="checkpoint, or folder of a run, whose newest one is taken"
    )
    for command, default in ((to_mcore, "stored"), (to_hf, "bfloat16")):
        command.add_argument("out", type=Path, metavar="OUT_FOLDER", help="folder to write")
        command.add_argument(
            "--dtype", choices=DTYPES, default=default, help="dtype of all weights, default %(default)s"
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str], prog: str = "simpo convert") -> int:
    """The exit code: 0, or that of the error, which is printed."""
    arguments = parse_arguments(argv, prog)
    return run_command(lambda groups: convert(arguments, groups))


def convert(arguments: argparse.Namespace, groups: ParallelGroups) -> int:
    """0, after the output was written."""
    import torch

    from simpo_megatron.mcore.precision import rounding
    from simpo_megatron.offline.convert import to_hf, to_mcore
    from simpo_megatron.offline.weights import open_weights

    dtype = None if arguments.dtype == "stored" else getattr(torch, arguments.dtype)
    weights = open_weights(arguments.source, groups)
    if weights.named != weights.folder:
        print(visible(f"NOTE the adapters in {weights.named} are added to their base model, {weights.folder}"))
    if arguments.command == "hf-to-mcore":
        to_mcore(weights, arguments.out, groups, dtype=dtype)
    else:
        to_hf(weights, arguments.out, dtype=dtype)
    said = rounding({spec.dtype for spec in weights.specs.values()}, dtype) if dtype is not None else None
    if said is not None:
        print(visible(f"NOTE {said}; --dtype stored keeps every bit"))
    print(visible(arguments.out))
    return 0
