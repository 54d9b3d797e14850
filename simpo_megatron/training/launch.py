"""From a command line to running ranks: starts the local ranks that are missing, and turns errors into exit codes."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from simpo_megatron.config import Config, load_config
from simpo_megatron.errors import PeerFailedError, SimPOError, report_error, status_line, visible
from simpo_megatron.logs import ignore_known_warnings
from simpo_megatron.mcore import device
from simpo_megatron.nemo import load_nemo_command, names_nemo_config
from simpo_megatron.training.environment import prepare_environment

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str], *program: str) -> int:
    """The exit code of one process of the training run `program argv`, as `launch` has it."""
    return launch(argv, _read_training, *program)


def launch(
    argv: Sequence[str], read: Callable[[Sequence[str]], tuple[Config, Callable[[], None]]], *program: str
) -> int:
    """The exit code of one process of the job `program argv`: 0 done, else the error's own (errors.py), 1 unexpected.

    Every rank reads the same configuration and finds the same mistake in it before any collective; rank 0 says it.

    Args:
        read: from `argv` the configuration, which says how many ranks the job needs, and the job of one rank.
        program: a script, or -m, a module and its first arguments, as torchrun takes them to start further ranks.
    """
    try:
        config, work = read(argv)
        num_ranks = config.parallel.sizes.min_world_size
        starts_ranks = _world_size() == 1 and num_ranks > 1
        if not starts_ranks:
            # Before CUDA starts. Ranks would take what this process sets for the user's.
            prepare_environment(config)
        ignore_known_warnings(has_cuda=device.has_cuda())
        if starts_ranks:
            from simpo_megatron.training.setup import plan_run

            plan_run(config, num_ranks)
            return _start_local_ranks(num_ranks, [*program, *argv])
        work()
    except SimPOError as error:
        # Peers that stop because of another rank's error, or share rank 0's, stay quiet about it.
        if _rank() == 0 and not isinstance(error, PeerFailedError):
            report_error(error, rank=0)
        _tell_torchrun(error)
        return error.exit_code
    except KeyboardInterrupt:
        # Before the first step, or a second time: a run that steps notes it, saves and is told as any that was stopped.
        if _rank() == 0:
            text = "interrupted; nothing was saved since the last checkpoint"
            print(status_line("STOPPED", text, _rank()), file=sys.stderr, flush=True)
        return _INTERRUPTED
    except Exception as error:
        report_error(error, rank=_rank())
        _tell_torchrun(error)
        print(visible(traceback.format_exc(), keep="\n"), file=sys.stderr, flush=True)
        return 1
    return 0


def _read_training(argv: Sequence[str]) -> tuple[Config, Callable[[], None]]:
    """The configuration of a training run, and the run."""
    config, notes = _read(argv)

    def work() -> None:
        # Only now, for megatron takes ten seconds to import: a mistake in the configuration is told before, and the
        # processes that tokenise, which import the script again, do without.
        from simpo_megatron.training.loop import train

        if notes and _rank() == 0:
            print(*map(visible, notes), sep="\n", flush=True)
        train(config)

    return config, work


def _read(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration, and for the reader what became of the keys of a NeMo file, if it is one."""
    if not names_nemo_config(argv):
        return load_config(argv), []
    config, report = load_nemo_command(argv)
    return config, report.lines()


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _tell_torchrun(error: Exception) -> None:
    """Put the line where torchrun looks for what its report calls the root cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        line = visible(f"{type(error).__name__}: {error}")
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")


def _start_local_ranks(num_ranks: int, command: Sequence[str]) -> int:
    """The exit code of the ranks of `command` that a local torchrun starts, `num_ranks` of them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    device.require_local_ranks(num_ranks)
    arguments = ["--nproc-per-node", str(num_ranks), *command]
    print(
        f"1 rank runs, the layout needs {num_ranks}; starting them here: torchrun {visible(shlex.join(arguments))}",
        flush=True,
    )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        # torchrun would kill its ranks 30 s after a signal. In a thread it takes none, and this one hands them on.
        with ThreadPoolExecutor(1) as pool, _signals_handed_on():
            pool.submit(torchrun, ["--standalone", *arguments]).result()
    except ChildFailedError as failure:
        return _exit_code_of_the_ranks(failure)
    return 0


def _exit_code_of_the_ranks(failure: ChildFailedError) -> int:
    """The exit code of the rank that failed first; 128 more than the signal that killed it, as shells say it."""
    in_order = sorted(failure.failures.values(), key=lambda one: one.timestamp)
    codes = [one.exitcode for one in in_order]
    # torchrun tells the other ranks to terminate once one has failed; that says nothing of the cause.
    code = next((code for code in codes if code != -signal.SIGTERM), codes[0])
    return code if code >= 0 else 128 - code


@contextmanager
def _signals_handed_on() -> Iterator[None]:
    """While the context lasts, signals that ask this process to stop are sent to its ranks; without any it ends."""
    import psutil

    def hand_on(number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        for rank in ranks:
            rank.send_signal(number)
        if not ranks:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def is_news(record: logging.LogRecord) -> bool:
        return "running on a child thread" not in str(record.msg)

    elastic = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    elastic.addFilter(is_news)
    before = {number: signal.signal(number, hand_on) for number in _HANDED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        elastic.removeFilter(is_news)
