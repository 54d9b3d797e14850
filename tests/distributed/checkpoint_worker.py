"""Runs of the trainer, two at a time, each on forked ranks, so that torch and megatron are imported once.

`checkpoint_worker.py FOLDER`: FOLDER/runs.json lists runs: a name, options, and what else `Run` says. Each run saves
in FOLDER/<name> unless its options say otherwise, only at its end if they do not say, and leaves FOLDER/<name>.json.
Runs of the same folder, and a copy and what it is of, are one after the other, as they are listed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

import injections  # noqa: E402
import matplotlib.pyplot  # noqa: E402, F401
import transformers.models.llama  # noqa: E402, F401
from ranks import free_port  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402, F401

from simpo_megatron.config import config_from, to_yaml  # noqa: E402
from simpo_megatron.errors import SimPOError, StoppedBySignal  # noqa: E402
from simpo_megatron.stop_signals import StopSignals  # noqa: E402
from simpo_megatron.training import launch  # noqa: E402
from simpo_megatron.training import run as training_run  # noqa: E402

LIMIT_SECONDS = 90.0
AT_ONCE = 2
"""Ranks mostly compute while they start, and mostly wait when one of them has failed."""


@dataclass
class Run:
    """One run."""

    name: str
    options: dict[str, Any]
    copy_of: str | None = None
    """Begin with a copy of this run's folder."""
    num_ranks: int = 2
    flip: str | None = None
    """Change the middle byte of this file before the start."""
    rename: list | None = None
    """[checkpoint, tensor, new name]: change its name before the start."""
    write_again: bool = False
    """After a resume, write the state that was read to FOLDER/<name>.state."""
    file_limit: list | None = None
    """[rank, bytes]: that rank can write no larger file, as on a full disk."""
    memory_limit: list | None = None
    """[rank, bytes]: that rank may map only so many bytes more once the memory probe begins."""
    kill: list | None = None
    """[rank, audit event, pattern, n, signal]: that rank gets a signal, SIGKILL if not named, just before the nth event
    with such arguments."""
    kill_after_seconds: float | None = None
    """The whole job dies this long after its first draft appears."""
    hold_writer: list | None = None
    """[rank, pattern, iteration, seconds]: that rank's writer opens such a file only once the iteration is logged, or
    the seconds are over."""
    full_disk: list | None = None
    """[rank, pattern]: no byte fits into such a file of that rank."""
    fault: str | None = None
    """SIMPO_FAULT of this run."""
    other_options: list | None = None
    """[rank, options] that this rank alone was started with."""
    disturb: list | None = None
    """[rank, n]: a replicated weight of this rank is changed a little after its nth step, 0: before the first."""
    spoil_gradient: list | None = None
    """[rank, n]: a value of this rank's gradient overflows in its nth step, with a finite loss."""
    compare_state: bool = False
    """Say of each step that raises whether weights, moments and schedule are, bit for bit, as before it."""
    shorten_plan: list | None = None
    """[rank, n]: that rank takes its nth step with a microbatch fewer than was planned for it."""
    swap_collectives: int | None = None
    """This rank issues the two halves of every sum of gradients over data-parallel ranks in the other order."""
    kill_after_log: list | None = None
    """[text, seconds]: the whole job is killed so long after a rank has printed the text."""
    grace_seconds: float = 5.0
    """Seconds in which ranks must end by themselves after one has failed; torchrun gives 30."""
    vanish: list | None = None
    """[rank, n]: that rank removes the run's folder at the start of its nth step."""
    read_only: list | None = None
    """[rank, n]: that rank makes the run's folder a read-only file system at the start of its nth step, as root."""
    by_command: bool = False
    """Through the command line, which prints errors and turns them into exit codes."""
    folders: list | None = None
    """The working folder of each rank."""
    signal_store: list | None = None
    """[n, signal, rank 0 too]: the process that keeps the ranks' store gets a signal at the start of rank 0's nth step,
    and so may rank 0."""
    signals: list | None = None
    """[rank, n, names]: that rank gets these signals, one after the other, at the start of its nth step of this run."""


def main(folder: Path) -> None:
    runs = [Run(**entry) for entry in json.loads((folder / "runs.json").read_text())]
    chains: list[list[Run]] = []
    of_folder: dict[str, list[Run]] = {}
    for run in runs:
        run.options.setdefault("save", str(folder / run.name))
        if run.options["save"] is not None:
            run.options.setdefault("save_interval", 1000)
        before = of_folder.get(str(folder / run.copy_of) if run.copy_of else run.options["save"] or run.name)
        if before is None:
            chains.append(before := [])
        before.append(run)
        of_folder[run.options["save"] or run.name] = before
    working: set[int] = set()
    for chain in chains:
        if len(working) == AT_ONCE:
            working.discard(wait_for_one())
        process = os.fork()
        if process == 0:
            try:
                for run in chain:
                    do(run, folder)
            finally:
                os._exit(0)
        working.add(process)
    while working:
        working.discard(wait_for_one())


def wait_for_one() -> int:
    return os.waitpid(-1, 0)[0]


def do(run: Run, folder: Path) -> None:
    if run.copy_of:
        shutil.copytree(folder / run.copy_of, run.options["save"])
    if run.flip:
        injections.flip_byte(folder / run.name / run.flip)
    if run.rename:
        injections.rename_tensor(folder / run.name / run.rename[0], *run.rename[1:])
    if run.read_only:
        injections.mount_for_this_process_alone()
    started = time.monotonic()
    outcome = start(run, folder)
    seconds = time.monotonic() - started
    print(f"{run.name}: {outcome['codes']} in {seconds:.1f} s", flush=True)
    (folder / f"{run.name}.json").write_text(json.dumps(outcome))


def start(run: Run, folder: Path) -> dict[str, Any]:
    """The end of the ranks.

    `codes`: of each its exit code, negative for a signal; `since_phase`: of each the seconds from the last phase that
    any rank had begun to its end; `output`: what the first rank printed; `apart`: the seconds from the
    first end to the last.
    """
    os.environ.update(
        WORLD_SIZE=str(run.num_ranks),
        LOCAL_WORLD_SIZE=str(run.num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    processes = [fork_rank(rank, run, folder) for rank in range(run.num_ranks)]
    codes: dict[int, int] = {}
    ends: dict[int, float] = {}
    deadline, kill_at = time.monotonic() + LIMIT_SECONDS, None
    failed_at = None
    while len(codes) < run.num_ranks:
        for rank, process in enumerate(processes):
            if rank not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    ends[rank] = time.time()
        saves = run.kill_after_seconds is not None and any(Path(run.options["save"]).glob("*.tmp-*"))
        if saves and kill_at is None:
            kill_at = time.monotonic() + run.kill_after_seconds
        if run.kill_after_log and kill_at is None and run.kill_after_log[0] in logs_of(run, folder):
            kill_at = time.monotonic() + run.kill_after_log[1]
        # As torchrun does: the first rank that fails takes the others with it.
        if failed_at is None and any(code not in (0, StoppedBySignal.exit_code) for code in codes.values()):
            failed_at = time.monotonic()
        must_end = failed_at is not None and time.monotonic() > failed_at + run.grace_seconds
        must_end = must_end or time.monotonic() > (kill_at or deadline)
        if must_end:
            for rank, process in enumerate(processes):
                if rank not in codes:
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    log = folder / f"{run.name}.rank0.log"
    output = log.read_text() if log.exists() else ""
    phase = phase_file(run, folder)
    last_phase = phase.stat().st_mtime if phase.exists() else min(ends.values())
    ranks = range(run.num_ranks)
    return {
        "codes": [codes[rank] for rank in ranks],
        "since_phase": [ends[rank] - last_phase for rank in ranks],
        "output": output,
        "apart": max(ends.values()) - min(ends.values()),
    }


def logs_of(run: Run, folder: Path) -> str:
    return "".join(log.read_text() for log in folder.glob(f"{run.name}.rank*.log"))


def phase_file(run: Run, folder: Path) -> Path:
    return folder / f"{run.name}.phase"


def fork_rank(rank: int, run: Run, folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    log = os.open(folder / f"{run.name}.rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        if rank == 0:
            injections.record_pairs(Path(f"{folder / run.name}.pairs"))
        if run.kill and run.kill[0] == rank:
            injections.signal_at(*run.kill[1:])
        if run.hold_writer and run.hold_writer[0] == rank:
            injections.hold_writer(*run.hold_writer[1:], Path(run.options["save"], "metrics.jsonl"))
        if run.full_disk and run.full_disk[0] == rank:
            injections.fill_disk(run.full_disk[1])
        if run.signals and run.signals[0] == rank:
            injections.signal_at_step(*run.signals[1:])
        if run.signal_store and rank == 0:
            injections.signal_store_at_step(*run.signal_store)
        if run.vanish and run.vanish[0] == rank:
            injections.remove_at_step(run.vanish[1], Path(run.options["save"]))
        if run.read_only and run.read_only[0] == rank:
            injections.make_read_only_at_step(run.read_only[1], Path(run.options["save"]))
        if run.file_limit and run.file_limit[0] == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (run.file_limit[1], run.file_limit[1]))
        if run.memory_limit and run.memory_limit[0] == rank:
            injections.limit_memory(run.memory_limit[1])
        if run.fault:
            os.environ["SIMPO_FAULT"] = run.fault
        if run.disturb and run.disturb[0] == rank:
            injections.disturb_weight(run.disturb[1])
        if run.spoil_gradient and run.spoil_gradient[0] == rank:
            injections.spoil_gradient(run.spoil_gradient[1])
        if run.shorten_plan and run.shorten_plan[0] == rank:
            injections.shorten_plan(*run.shorten_plan)
        if run.swap_collectives is not None:
            injections.halve_sums_of_gradients(swap=run.swap_collectives == rank)
        injections.note_phases(phase_file(run, folder))
        if run.compare_state:
            injections.compare_state_of_steps()
        if run.other_options and run.other_options[0] == rank:
            run.options.update(run.other_options[1])
        if run.write_again:
            injections.write_after_start(Path(f"{folder / run.name}.state"))
        if run.folders:
            os.chdir(run.folders[rank])
        if run.by_command:
            code = by_command(run, folder, rank)
        else:
            training_run.train(config_from(**run.options))
            code = 0
    except SimPOError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = error.exit_code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)


def by_command(run: Run, folder: Path, rank: int) -> int:
    file = folder / f"{run.name}.rank{rank}.yaml"
    file.write_text(to_yaml(config_from(**run.options)))
    with StopSignals():
        return launch.main(["--config", str(file)], "nothing")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
