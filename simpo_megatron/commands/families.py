"""Lists the model families that can be trained, and proves that megatron-core computes them as transformers does.

simpo families
simpo families --prove qwen3 granite

--prove builds small random models of the families, one for each configuration that the family's file lists. In fp32, on
this machine, it compares the logits of both libraries and every tensor of an export. Without names it takes all
families. Exit code 0: all are the same (logits within 1e-4); 1: something differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.errors import ConfigError
from simpo_megatron.offline.command import run_command

if TYPE_CHECKING:
    from simpo_megatron.parallel import ParallelGroups

BUDGET = 1e-4
"""Between logits of a standard deviation of about one, in fp32: matrix products that are summed in another order."""


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("--prove", nargs="*", metavar="FAMILY", help="compare these families with transformers, or all")
    return parser.parse_args(argv)


def main(argv: Sequence[str], prog: str = "simpo families") -> int:
    """The exit code: 0 when what was compared is the same, 1 when not, or that of the error, which is printed."""
    arguments = parse_arguments(argv, prog)
    return run_command(lambda groups: show(arguments.prove, groups))


def show(names: Sequence[str] | None, groups: ParallelGroups) -> int:
    """0 after the table was printed, or 1 where a family that was to be proved differs.

    Raises:
        ConfigError: a name is not that of a family.
    """
    from simpo_megatron.mcore.families import FAMILIES

    unknown = [name for name in names or () if name not in FAMILIES]
    if unknown:
        raise ConfigError(f"--prove: found {unknown[0]!r}, expected some of {', '.join(FAMILIES)}")
    console = Console()
    if names is None:
        table = Table("family", "models", "proved by")
        for name, family in FAMILIES.items():
            table.add_row(name, "\n".join(family.examples), " ".join(family.tests))
        console.print(table)
        return 0
    return _prove(names or list(FAMILIES), groups, console)


def _prove(names: Sequence[str], groups: ParallelGroups, console: Console) -> int:
    from simpo_megatron.mcore.families import FAMILIES
    from simpo_megatron.offline.family_proof import prove

    table, all_equal = Table("family", "model", "largest difference of logits", "tensors equal after export"), True
    for name in names:
        for proof in prove(FAMILIES[name], groups):
            all_equal &= proof.largest_difference <= BUDGET and proof.num_equal == proof.num_tensors
            equal = f"{proof.num_equal} of {proof.num_tensors}"
            table.add_row(name, proof.model, f"{proof.largest_difference:.1e}", equal)
    console.print(table)
    return 0 if all_equal else 1
