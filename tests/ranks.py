"""Start a script on several gloo ranks of this machine, bounded in time, and fail with what they printed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port that nothing listens on, and that the kernel gives no connection until somebody does.

    What `bind` to port 0 gives may be some other process's outgoing connection by the time a rank listens on it.
    """
    kernels_own = Path("/proc/sys/net/ipv4/ip_local_port_range")
    below = int(kernels_own.read_text().split()[0]) if kernels_own.exists() else 32768
    while True:
        port = random.SystemRandom().randrange(below // 2, below)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run_ranks(script: Path, num_ranks: int, *arguments: str, timeout: float = 300.0, fresh: bool = False) -> None:
    """Run `python script *arguments` on `num_ranks` ranks; an error, with every rank's output, unless all exit 0.

    The first rank that fails, and the time limit, end the others. Ranks are forked from one process that has imported
    torch and megatron already (see preloaded.py), unless `fresh` asks for interpreters of their own.
    """
    # Groups that only a circle of references holds keep threads that wake up a hundred times a second.
    gc.collect()
    environment = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "PYTHONWARNINGS": "ignore",
    }
    start = _start_fresh if fresh else _start_forked
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(num_ranks)]
        ranks = [
            start([str(script), *arguments], {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
            for rank, log in enumerate(logs)
        ]
        failure = _wait(ranks, timeout)
        if failure:
            # What says nothing of a lost connection is nearest to the cause.
            texts = sorted((log.read_text() for log in logs if log.exists()), key=lambda t: "Connection closed" in t)
            printed = "\n---\n".join(text[-4000:] for text in texts)
            raise AssertionError(f"{Path(script).name}: {failure}\n{printed}")


class _Rank(NamedTuple):
    """A rank that was started, in a session of its own."""

    pid: int
    exit_code: Callable[[], int | None]
    """None while it runs, negative for a signal."""


def _start_fresh(command: list[str], variables: dict[str, str], log: Path) -> _Rank:
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Rank(process.pid, process.poll)


def _start_forked(command: list[str], variables: dict[str, str], log: Path) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    process = context.Process(target=_run_script, args=(command, {**os.environ, **variables}, str(log)))
    process.start()
    return _Rank(process.pid, lambda: process.exitcode)


def _run_script(command: list[str], variables: dict[str, str], log: str) -> None:
    """Runs `python *command` in a forked rank, as far as the script can tell."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv[:] = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def _end_with_parent() -> None:
    """End this rank and what it started when the tests were killed, or it waits for its peers on a busy core."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "the rank was forked for a test process"
    parent.join()
    os.killpg(0, signal.SIGKILL)


def within(seconds: float) -> float:
    """The time for what takes at most `seconds` where each process has a core: tests beside this one have some, too."""
    return seconds * max(2.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def python_output(*command: str, timeout: float = 400.0) -> str:
    """The output of `python COMMAND` in the repository's folder, an error unless it ends well."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def leave_groups() -> None:
    """Destroy every group but the world, so that the next layout finds none and none of their threads stays awake.

    Collectives: one barrier, world.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def _wait(ranks: list[_Rank], timeout: float) -> str | None:
    deadline = time.monotonic() + timeout
    failure = None
    while failure is None and None in (codes := [rank.exit_code() for rank in ranks]):
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            failure = f"rank {failed[0]} exited with {codes[failed[0]]}"
        elif time.monotonic() > deadline:
            failure = f"still running after {timeout} s"
        time.sleep(0.05)
    if failure is None and any(codes):
        failure = f"exit codes {codes}"
    for rank in ranks:
        if rank.exit_code() is None:
            # A rank that was forked just now may not lead a session yet.
            for kill in (os.killpg, os.kill):
                with suppress(ProcessLookupError):
                    kill(rank.pid, signal.SIGKILL)
            while rank.exit_code() is None:
                time.sleep(0.01)
    return failure
