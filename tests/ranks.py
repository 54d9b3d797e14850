"""Start a script on several gloo ranks of this machine, bounded in time, and fail with what they printed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def run_ranks(script: Path, num_ranks: int, *arguments: str, timeout: float = 300.0) -> None:
    """Run `python script *arguments` on `num_ranks` ranks; an error, with every rank's output, unless all exit 0.

    The first rank that fails, and the time limit, end the others.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(num_ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=logs[rank].open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank in range(num_ranks)
        ]
        failure = _wait(processes, timeout)
        if failure:
            # What says nothing of a lost connection is nearest to the cause.
            texts = sorted((log.read_text() for log in logs), key=lambda text: "Connection closed" in text)
            printed = "\n---\n".join(text[-4000:] for text in texts)
            raise AssertionError(f"{Path(script).name}: {failure}\n{printed}")


def _wait(processes: list[subprocess.Popen], timeout: float) -> str | None:
    deadline = time.monotonic() + timeout
    failure = None
    while failure is None and any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            failure = f"rank {failed[0]} exited with {codes[failed[0]]}"
        elif time.monotonic() > deadline:
            failure = f"still running after {timeout} s"
        time.sleep(0.05)
    if failure is None and any(process.returncode for process in processes):
        failure = f"exit codes {[process.returncode for process in processes]}"
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return failure
