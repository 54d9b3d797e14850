"""Averages models that differ in their weights alone, such as a SimPO and a DPO run from the same start.

python tools/merge_checkpoints.py OUT runs/simpo/hf runs/dpo/hf
python tools/merge_checkpoints.py OUT runs/simpo runs/dpo --shares 0.7 0.3

Each model is a Hugging Face folder, a Megatron checkpoint, or a run's folder, whose newest one counts. OUT becomes a
Hugging Face folder, in the dtype of the first model, with its configuration and tokenizer. Models that differ in
architecture, shapes or tokenizer are refused. Sums are fp32, one tensor at a time; the output appears when it is whole.
"""

import argparse
import sys
from pathlib import Path

from simpo_megatron.offline.command import run_command
from simpo_megatron.parallel import ParallelGroups


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="two or more")
    parser.add_argument("--shares", type=float, nargs="+", metavar="S", help="of each model; equal when not given")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or that of the error, which is printed."""
    arguments = parse_arguments(argv)
    return run_command(lambda groups: average(arguments, groups))


def average(arguments: argparse.Namespace, groups: ParallelGroups) -> int:
    """Writes the output and returns 0."""
    from simpo_megatron.offline.merge import merge
    from simpo_megatron.offline.weights import open_weights

    models = [open_weights(path, groups) for path in arguments.models]
    shares = arguments.shares or [1.0] * len(models)
    merge(models, shares, arguments.out)
    parts = " + ".join(f"{share / sum(shares):.3g} x {model.folder}" for share, model in zip(shares, models))
    print(f"{arguments.out} = {parts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
