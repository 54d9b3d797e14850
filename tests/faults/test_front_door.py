"""Signals to `simpo train`: they reach every rank, the run is saved, and the exit code is that of the ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import REPOSITORY

OPTIONS = [
    "--train-iters", "100000", "--fp32", "--global-batch-size", "8", "--tokens-per-microbatch", "512",
    "--max-length", "256", "--max-prompt-length", "128", "--log-interval", "1", "--no-probe-memory",
]  # fmt: skip
STOPPED = 75
COMMANDS = {
    "two ranks, SIGTERM": ("2", signal.SIGTERM),
    "two ranks, Ctrl-C": ("2", signal.SIGINT),
    "one rank, Ctrl-C": ("1", signal.SIGINT),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(folder: Path, cache: Path, *options: str) -> subprocess.Popen:
    """`simpo train` outside the checkout, in a session of its own as a terminal has."""
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.Popen(
        [sys.executable, "-m", "simpo_megatron", "train", *OPTIONS, *options, "--data-cache", str(cache)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=(folder / "out").open("a"),
        stderr=(folder / "err").open("a"),
        start_new_session=True,
    )


def end(job: subprocess.Popen) -> None:
    """Leave nothing behind, whatever the test found."""
    if job.poll() is None:
        for process in (*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)):
            process.kill()
        job.wait()


def wait_for_steps(folder: Path, job: subprocess.Popen, count: int) -> int:
    """The number of logged steps, once there are `count`."""
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 400
    while not metrics.exists() or metrics.read_text().count("grad_norm") < count:
        assert job.poll() is None and time.monotonic() < deadline, (folder / "err").read_text()[-3000:]
        time.sleep(0.1)
    return metrics.read_text().count("grad_norm")


@pytest.mark.parametrize("case", COMMANDS)
def test_a_signal_stops_the_run_saved_with_the_ranks_own_exit_code(case, tmp_path, cache):
    tp, number = COMMANDS[case]
    job = start(tmp_path, cache, "--tp", tp, "--save", str(tmp_path / "run"))
    try:
        wait_for_steps(tmp_path, job, 2)
        # As a terminal does: to every process of the session; ranks that torch started have sessions of their own.
        os.killpg(job.pid, number) if number == signal.SIGINT else job.send_signal(number)
        assert job.wait(300) == STOPPED, (tmp_path / "err").read_text()[-3000:]
    finally:
        end(job)
    num_steps = (tmp_path / "run" / "metrics.jsonl").read_text().count("grad_norm")
    (committed,) = (tmp_path / "run").glob("iter_*")
    assert committed.name == f"iter_{num_steps:07d}" and (committed / "COMMIT.json").is_file()
    err = (tmp_path / "err").read_text()
    assert len(re.findall("received; stopping after this step", err)) == int(tp)
    (line,) = re.findall("^STOPPED simpo_megatron.*", err, re.MULTILINE)
    assert f"{number.name}: stopped after step {num_steps}, saved in" in line
    assert "Traceback" not in err


def test_a_killed_rank_ends_the_run_the_same_command_continues_it_and_its_ranks_end_with_it(tmp_path, cache):
    options = ["--tp", "2", "--save", str(tmp_path / "run"), "--save-interval", "2", "--resume", "latest"]
    job = start(tmp_path, cache, *options)
    try:
        wait_for_steps(tmp_path, job, 3)
        psutil.Process(job.pid).children()[0].kill()
        assert job.wait(300) in (6, 128 + signal.SIGKILL), (tmp_path / "err").read_text()[-3000:]
    finally:
        end(job)
    saved = max((tmp_path / "run").glob("iter_*[0-9]")).name
    job = start(tmp_path, cache, *options)
    try:
        steps = wait_for_steps(tmp_path, job, 3)
        wait_for_steps(tmp_path, job, steps + 2)
        ranks = psutil.Process(job.pid).children()
        job.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        for rank in alive:
            rank.kill()
        assert len(ranks) == 2 and alive == []
    finally:
        end(job)
    assert f"torchrun, process {job.pid}, which started the ranks, is gone" in (tmp_path / "err").read_text()
    assert f"run/{saved}: step {int(saved.removeprefix('iter_'))}" in (tmp_path / "out").read_text()


def test_a_mistake_is_told_by_the_command_alone_before_ranks_are_started(tmp_path, cache):
    job = start(tmp_path, cache, "--tp", "2", "--max-length", "4096")
    try:
        assert job.wait(200) == 2
    finally:
        end(job)
    # torch logs a line of its own where CUDA's compiler is there and no GPU.
    (line,) = [line for line in (tmp_path / "err").read_text().splitlines() if "cpp_extension" not in line]
    assert line.startswith("ERROR simpo_megatron") and "max_length: found 4096" in line
    assert (tmp_path / "out").read_text() == ""
