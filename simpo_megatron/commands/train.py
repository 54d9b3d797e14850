"""Trains a model on preference pairs with SimPO.

simpo train                                                       a tiny model on bundled pairs
simpo train --model DIR --data pairs.jsonl --save runs/mine       one GPU, or the CPU
torchrun --nproc-per-node 8 -m simpo_megatron train --tp 8 ...    ranks that torchrun starts

Without torchrun it starts as many ranks on this machine as the layout needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from simpo_megatron.training import launch


def main(argv: Sequence[str], prog: str = "simpo train") -> int:
    """The exit code: 0 done, 75 stopped by a signal after saving, else that of the error (errors.py).

    Args:
        prog: where it is a script's file, ranks that are missing run that script, otherwise the package.
    """
    program = [prog] if prog.endswith(".py") else ["-m", "simpo_megatron", "train"]
    return launch.main(argv, *program)
