"""Trains many settings on the same ranks, model and pairs, and ranks them: the best, and those level with it.

simpo sweep --model DIR --data F --valid-data V --sweep lr=5e-7,1e-6 beta=2,2.5,10 --save runs/sweep
simpo sweep --config FILE --halving 3 --keep 3            the values to try stand under `sweep:` in FILE
torchrun --nproc-per-node 8 -m simpo_megatron sweep --tp 8 ...     ranks that torchrun starts

Every option of the trainer may follow. Each trial is an ordinary run in its own folder below --save, bit for bit the
run it would be alone. The same command continues a stopped sweep: finished trials are skipped, the interrupted one
resumes from its checkpoint. The results are sweep.html, sweep.json and best.yaml in that folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.errors import SimPOError, report_error, visible
from simpo_megatron.planning.gpus import GPUS
from simpo_megatron.sweep.request import Sweep, read_sweep
from simpo_megatron.training import launch
from simpo_megatron.training.start.early_checks import check_inputs


def parse_arguments(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options and, untouched, those of the trainer."""
    parser = CommandParser(prog, __doc__, takes_trainer_options=True)
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="OPTION=VALUE,VALUE",
        help="values of options of the objective or the optimizer, or of seed; all combinations are trained",
    )
    parser.add_argument(
        "--order",
        choices=("grid", "staged"),
        default="grid",
        help="grid trains all combinations (the default), staged tunes one option after the other, in the order given",
    )
    parser.add_argument(
        "--halving",
        type=int,
        metavar="FACTOR",
        help="train all settings briefly, then the best one in FACTOR for FACTOR times as long, and so on",
    )
    parser.add_argument("--keep", type=int, metavar="N", help="keep the checkpoints of the N best settings only")
    parser.add_argument(
        "--array",
        action="store_true",
        help="share the trials with other processes of the same command, such as tasks of a Slurm array",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the trials and their cost, and train nothing")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="with --dry-run: GPUs to plan for, default those of the layout"
    )
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), default="h100-80gb", help="with --dry-run: kind of GPU, default h100-80gb"
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str], prog: str = "simpo sweep") -> int:
    """The exit code: 0 when every trial has ended, 75 stopped by a signal after saving, else that of the error."""
    own, of_the_trainer = parse_arguments(argv, prog)
    if own.dry_run:
        return _dry_run(own, of_the_trainer)
    return launch.launch(argv, _read, "-m", "simpo_megatron", "sweep")


def _dry_run(own: argparse.Namespace, of_the_trainer: Sequence[str]) -> int:
    try:
        sweep = _sweep(own, of_the_trainer)
        # Only now, for torch and megatron take seconds to import.
        from simpo_megatron.sweep.dry_run import dry_run

        num_gpus = own.gpus or sweep.base.parallel.sizes.min_world_size
        print(*map(visible, dry_run(sweep, num_gpus=num_gpus, gpu=own.gpu)), sep="\n")
    except SimPOError as error:
        return report_error(error)
    return 0


def _read(argv: Sequence[str]) -> launch.RankJob:
    """The configuration that all trials share, and the sweep."""
    sweep = _sweep(*parse_arguments(argv, "simpo sweep"))
    check_inputs(sweep.base)

    def work() -> None:
        # Imported only now: megatron takes seconds to import.
        from simpo_megatron.sweep.driver import run_sweep

        run_sweep(sweep)

    return launch.RankJob(sweep.base, work)


def _sweep(own: argparse.Namespace, of_the_trainer: Sequence[str]) -> Sweep:
    return read_sweep(of_the_trainer, own.sweep, order=own.order, halving=own.halving, keep=own.keep, shared=own.array)
