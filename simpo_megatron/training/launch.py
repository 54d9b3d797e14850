"""From a command line to running ranks: starts the local ranks that are missing, and turns errors into exit codes."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from simpo_megatron import stop_signals
from simpo_megatron.collector import collector_at_rest
from simpo_megatron.config import Config, load_config
from simpo_megatron.errors import SimPOError, StoppedBySignal, report_error, status_line, visible
from simpo_megatron.launched import has_agent
from simpo_megatron.logs import ignore_known_warnings
from simpo_megatron.nemo import load_nemo_command, names_nemo_config
from simpo_megatron.training.peers.telling import errors_told

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Set for ranks whose agent is a thread of `simpo train`, which prints nothing when they end.
_QUIET_AGENT = "SIMPO_QUIET_AGENT"
_ELASTIC_LOGGERS = ("api", "errors.error_handler")


class RankJob(NamedTuple):
    """The job of a command line."""

    config: Config
    """It tells how many ranks to start."""
    work: Callable[[], None]
    """One rank's part."""
    told: Callable[[], AbstractContextManager[None]] = nullcontext
    """The context of all that may refuse the configuration, which says there how to change it."""


def main(argv: Sequence[str], *program: str) -> int:
    """The exit code of one process of the training run `program argv`, as `launch` has it."""
    return launch(argv, _read_training, *program)


def launch(argv: Sequence[str], read: Callable[[Sequence[str]], RankJob], *program: str) -> int:
    """The exit code of one process of the job `program argv`: 0 done, else the error's own (errors.py), 1 unexpected.

    Every rank reads the same configuration and finds the same mistake in it before any collective; rank 0 prints it.

    Args:
        read: returns the job that `argv` asks for.
        program: a script, or -m, a module and its first arguments, as torchrun takes them to start further ranks.
    """
    try:
        with errors_told():
            config, work, told = read(argv)
        num_ranks = config.parallel.sizes.min_world_size
        starts_ranks = _world_size() == 1 and num_ranks > 1
        _prepare_process(config, starts_ranks)
        if starts_ranks:
            from simpo_megatron.training.start.run_plan import plan_run

            with told():
                plan_run(config, num_ranks)
            return _start_local_ranks(num_ranks, [*program, *argv])
        with told():
            work()
    except SimPOError as error:
        # A rank that stops because of another's error, or shares rank 0's, prints nothing.
        if error.speaker == _rank():
            report_error(error, rank=_rank())
            if isinstance(error, StoppedBySignal) and has_agent() and _QUIET_AGENT not in os.environ:
                _say_after_torchrun(error)
        _tell_torchrun(error)
        return error.exit_code
    except Exception as error:
        report_error(error, rank=_rank())
        _tell_torchrun(error)
        print(visible(traceback.format_exc(), keep="\n"), file=sys.stderr, flush=True)
        return 1
    return 0


def _prepare_process(config: Config, starts_ranks: bool) -> None:
    """Load torch, transformers and, for a rank, megatron, as it is right for this machine."""
    # Only now, for they take seconds: a mistake in the configuration or in a name of a file is told before, and the
    # processes that tokenise, which import the script again, do without.
    with collector_at_rest():
        from simpo_megatron.mcore import cpu_patches, device
        from simpo_megatron.training.start.environment import prepare_environment

        if starts_ranks:
            cpu_patches.import_uncompiled(cpu_patches.CONFIGURATIONS)
        else:
            # Before CUDA starts. Not in a launcher: its ranks would take these values for the user's.
            prepare_environment(config)
        ignore_known_warnings(has_cuda=device.has_cuda())
    if not starts_ranks:
        from simpo_megatron.training.run import load_libraries

        load_libraries()


def _read_training(argv: Sequence[str]) -> RankJob:
    """The training run of a command line, or the explanation of a NeMo file."""
    if not names_nemo_config(argv):
        config = load_config(argv)
        _check_inputs(config)
        return RankJob(config, lambda: _train(config))
    command = load_nemo_command(argv)

    def explain() -> None:
        if _rank() == 0:
            print(*map(visible, command.lines), sep="\n", flush=True)

    def work() -> None:
        explain()
        _train(command.config)

    if command.only_explains:
        # One rank explains as well as many, and needs no model.
        return RankJob(Config(), explain)
    with command.spelling.told():
        _check_inputs(command.config)
    return RankJob(command.config, work, command.spelling.told)


def _check_inputs(config: Config) -> None:
    # Only now, for it takes model families and readers of data: a mistake in the command line is told before.
    from simpo_megatron.training.start.early_checks import check_inputs

    check_inputs(config)


def _train(config: Config) -> None:
    from simpo_megatron.training.run import train

    train(config)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _say_after_torchrun(stopped: StoppedBySignal) -> None:
    """Repeat how to continue, below torchrun's report on ranks that ended with a code other than 0.

    A detached shell prints it once torchrun has ended, after half a minute at most.
    """
    waits = 'for _ in $(seq 300); do kill -0 "$0" 2>/dev/null || break; sleep 0.1; done; printf "%s\\n" "$1" >&2'
    line = status_line(stopped.kind, stopped, _rank())
    subprocess.Popen(["sh", "-c", waits, str(os.getppid()), line], start_new_session=True)  # noqa: S603, S607


def _tell_torchrun(error: Exception) -> None:
    """Write the line to the file from which torchrun's report takes its root cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        line = visible(f"{type(error).__name__}: {error}")
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")


def _start_local_ranks(num_ranks: int, command: Sequence[str]) -> int:
    """The exit code of the ranks of `command` that a local torchrun starts, `num_ranks` of them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from simpo_megatron.mcore import device

    device.require_local_ranks(num_ranks)
    arguments = ["--nproc-per-node", str(num_ranks), *command]
    print(
        f"1 rank runs, the layout needs {num_ranks}; starting them here: torchrun {visible(shlex.join(arguments))}",
        flush=True,
    )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ[_QUIET_AGENT] = "1"
    try:
        # torchrun kills its ranks 30 s after a signal. In a thread it gets none; this process forwards them instead.
        with ThreadPoolExecutor(1) as pool, _signals_handed_on() as handed_on:
            pool.submit(torchrun, ["--standalone", *arguments]).result()
    except ChildFailedError as failure:
        return _exit_code_of_the_ranks(failure, handed_on)
    return 0


def _exit_code_of_the_ranks(failure: ChildFailedError, handed_on: set[int]) -> int:
    """The exit code of the rank that failed first; 128 more than the signal that killed it, as shells say it."""
    in_order = sorted(failure.failures.values(), key=lambda one: one.timestamp)
    codes = [one.exitcode for one in in_order]
    if -codes[0] in handed_on:
        # A signal killed a rank while its interpreter was starting.
        return report_error(StoppedBySignal(_before_the_run(-codes[0])), rank=0)
    # torchrun terminates the other ranks once one has failed; their codes say nothing about the cause.
    code = next((code for code in codes if code != -signal.SIGTERM), codes[0])
    return code if code >= 0 else 128 - code


def _before_the_run(number: int) -> str:
    return f"{signal.Signals(number).name}: stopped before the run began; the same command starts or continues it"


@contextmanager
def _signals_handed_on() -> Iterator[set[int]]:
    """While the context lasts, stop signals are forwarded to the ranks; with no rank yet, this process ends.

    Yields the list of signals forwarded so far.
    """
    import psutil

    handed_on: set[int] = set()
    if stop_signals.current is not None:
        stop_signals.current.ignore_from_now_on()

    def hand_on(number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        handed_on.add(number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if not ranks:
            # Not an exception: Python would then wait for the thread in which torchrun runs.
            os._exit(report_error(StoppedBySignal(_before_the_run(number)), rank=0))

    def is_news(record: logging.LogRecord) -> bool:
        # Ranks that were told to stop print the last line themselves.
        return not handed_on and "running on a child thread" not in str(record.msg)

    elastic = [logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}") for name in _ELASTIC_LOGGERS]
    for logger in elastic:
        logger.addFilter(is_news)
    before = {number: signal.signal(number, hand_on) for number in stop_signals.STOP_SIGNALS}
    try:
        yield handed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for logger in elastic:
            logger.removeFilter(is_news)
