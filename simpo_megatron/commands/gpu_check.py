"""Checks the GPU path on one GPU in at most eight minutes: exactness, speed and memory, a line for each check.

simpo gpu-check                         every check, on the first GPU
simpo gpu-check --only A1 C1 C3         some of them, by name
simpo gpu-check --rehearse              every check at tiny size on the CPU; no speed is judged

Results are written after each check, one JSON object a line, so that nothing is lost when the run is ended. Beside them
a file that ends in .log has what checks and their runs printed, and the traceback of a check that failed. One GPU
cannot tell of parallelism over NCCL, Transformer Engine's FP8, or several nodes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.errors import ConfigError, SimPOError, report_error


def main(argv: Sequence[str], prog: str = "simpo gpu-check") -> int:
    """The exit code: 0 when nothing failed, 1 when a check did, 2 without a GPU or for a mistake."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks to run, by name")
    parser.add_argument("--rehearse", action="store_true", help="run every check at tiny size on the CPU")
    parser.add_argument(
        "--out", default="runs/gpu_check.jsonl", metavar="FILE", help="file of results, default runs/gpu_check.jsonl"
    )
    parser.add_argument(
        "--minutes", type=float, default=8, metavar="N", help="minutes for all checks together, default 8"
    )
    arguments = parser.parse_args(argv)
    if arguments.rehearse:
        # Before torch is imported: a rehearsal is the same on every machine.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return _run(arguments.only, Path(arguments.out), 60 * arguments.minutes, rehearse=arguments.rehearse)
    except SimPOError as error:
        return report_error(error)


def _run(only: Sequence[str] | None, out: Path, seconds: float, *, rehearse: bool) -> int:
    from simpo_megatron.gpu_check.listing import CHECKS, START_SECONDS
    from simpo_megatron.gpu_check.runner import open_results, run_checks, working_folder
    from simpo_megatron.gpu_check.verdict import CheckSetting
    from simpo_megatron.mcore import device

    names = [check.name for check in CHECKS]
    for name in only or ():
        if name not in names:
            raise ConfigError(f"only: found {name!r}, expected names of {', '.join(names)}")
    if not rehearse and not device.has_cuda():
        raise ConfigError("gpu-check: found no GPU, expected one; --rehearse runs the checks at tiny size on the CPU")
    chosen = [check for check in CHECKS if only is None or check.name in only]
    allowed = min(seconds, START_SECONDS + sum(check.seconds for check in chosen))
    limits = "no time limits" if rehearse else ", ".join(f"{check.name} {check.seconds}" for check in chosen)
    print(
        f"{len(chosen)} checks, at most {seconds if rehearse else allowed:.0f} s; seconds of each: {limits}", flush=True
    )
    started = time.monotonic()
    log = out.with_suffix(".log").absolute()
    with working_folder() as folder, open_results(out) as results:
        log.write_text("", encoding="utf-8")
        setting = CheckSetting(folder=folder, log=log, rehearse=rehearse)
        num_failed = run_checks(chosen, setting, results, seconds, lambda line: print(line, flush=True))
    files = f"{out}, {out.with_suffix('.log')}" if num_failed else out
    print(f"{len(chosen)} checks, {num_failed} failed, {time.monotonic() - started:.0f} s; {files}")
    return int(num_failed > 0)
