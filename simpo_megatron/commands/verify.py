"""Compares two models tensor by tensor: Hugging Face folders, Megatron checkpoints, or one of each.

simpo verify Llama-3.1-8B checkpoints/llama
simpo verify runs/mine runs/mine/hf --pairs pairs.jsonl

A PEFT folder, or a run of adapters, is the model that they make of their base.
Prints the SHA-256 of every tensor on both sides, under its Hugging Face name. With --pairs also the average log-prob of
each response: of a folder by transformers, of a checkpoint by megatron-core, both in fp32 on the CPU. If one side
stores a tensor in fewer bits, both are cast to these before tensors and log-probs are compared.
Exit code 0: every value is the same (and log-probs are within 1e-4); 1: something differs; 4: a side cannot be read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.errors import visible
from simpo_megatron.offline.command import run_command

if TYPE_CHECKING:
    from simpo_megatron.convert.files import TensorSpec
    from simpo_megatron.offline.weights import Weights
    from simpo_megatron.parallel import ParallelGroups

BUDGET = 1e-4
"""Between average log-probs in fp32: matrix products that are summed in another order."""


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog, __doc__)
    kinds = "a Hugging Face folder, a Megatron checkpoint, or a run's folder, whose newest one is taken"
    parser.add_argument("first", type=Path, metavar="A", help=kinds)
    parser.add_argument("second", type=Path, metavar="B", help="the same kinds")
    parser.add_argument("--pairs", nargs="+", metavar="FILE", help="preference files to compare log-probs on")
    parser.add_argument("--max-pairs", type=int, default=20, metavar="N", help="use the first N pairs, default 20")
    return parser.parse_args(argv)


def main(argv: Sequence[str], prog: str = "simpo verify") -> int:
    """The exit code: 0 when the sides are the same, 1 when not, or that of the error, which is printed."""
    arguments = parse_arguments(argv, prog)
    return run_command(lambda groups: verify(arguments, groups))


def verify(arguments: argparse.Namespace, groups: ParallelGroups) -> int:
    """0 when the sides are the same, 1 when not, after both tables were printed."""
    from simpo_megatron.offline.weights import open_weights

    # In a file, names and hashes are not cut to the terminal's width.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    sides = [open_weights(path, groups) for path in (arguments.first, arguments.second)]
    equal = print_tensors(sides, console)
    if arguments.pairs:
        equal &= print_log_probs(sides, arguments.pairs, arguments.max_pairs, groups, console)
    return 0 if equal else 1


def print_tensors(sides: Sequence[Weights], console: Console) -> bool:
    """True when all tensors are equal, after a row was printed for each."""
    from simpo_megatron.mcore.precision import dtype_name
    from simpo_megatron.offline.compare import compare_tensors

    for name, side in zip("AB", sides, strict=True):
        console.print(visible(f"{name} {side.named}"), markup=False, highlight=False)
    table = Table("tensor", "stored as", "SHA-256 of A", "SHA-256 of B", "")
    num_equal = num_cast = num_tensors = 0
    for tensor in compare_tensors(*sides):
        num_tensors += 1
        num_equal += tensor.is_equal
        verdict = "equal" if tensor.is_equal else "DIFFERS"
        if tensor.cast_to is not None:
            num_cast += 1
            verdict += f" as {dtype_name(tensor.cast_to)}"
        if not tensor.is_equal and tensor.largest_difference is not None:
            verdict += f" by {tensor.largest_difference:.3g} at most"
        hashes = [digest[:16] if digest else "none" for digest in tensor.sha256]
        table.add_row(tensor.name, " / ".join(dict.fromkeys(map(describe, tensor.specs))), *hashes, verdict)
    console.print(table)
    cast = f"; {num_cast} are stored in two dtypes, and were compared once cast to the narrower" if num_cast else ""
    console.print(f"{num_equal} of {num_tensors} tensors are equal in every byte{cast}")
    return num_equal == num_tensors


def describe(spec: TensorSpec | None) -> str:
    """The dtype and shape of a tensor, as the table shows them."""
    from simpo_megatron.mcore.precision import dtype_name

    return "none" if spec is None else f"{dtype_name(spec.dtype)} {list(spec.shape)}"


def print_log_probs(
    sides: Sequence[Weights], files: list[str], max_pairs: int, groups: ParallelGroups, console: Console
) -> bool:
    """True when the log-probs of both sides agree, after a row was printed for each pair."""
    from simpo_megatron.mcore.precision import dtype_name
    from simpo_megatron.offline.compare import average_log_probs, common_dtype, read_pair_files

    with tempfile.TemporaryDirectory() as cache:
        pairs = read_pair_files(files, sides[0].tokenizer, Path(cache), max_pairs)
        cast_to = common_dtype(*sides)
        first, second = (average_log_probs(side, pairs, groups, cast_to) for side in sides)
    table = Table("pair", "chosen A", "chosen B", "rejected A", "rejected B", title="average log-prob of a token")
    largest = 0.0
    for number, (a, b) in enumerate(zip(first, second, strict=True), start=1):
        table.add_row(str(number), *(f"{value:.6f}" for value in (a[0], b[0], a[1], b[1])))
        largest = max(largest, abs(a[0] - b[0]), abs(a[1] - b[1]))
    console.print(table)
    rounded = "" if cast_to is None else f" of both models rounded to {dtype_name(cast_to)}"
    console.print(
        f"largest difference of {2 * len(first)} average log-probs{rounded}: {largest:.2e} (budget {BUDGET:g})"
    )
    return largest <= BUDGET
