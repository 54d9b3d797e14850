"""The end of a run under torchrun: one line with the cause, also in torchrun's report; a stop that saves."""

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

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--tp", "2", "--fp32", "--global-batch-size", "8", "--tokens-per-microbatch", "512", "--max-length", "256",
    "--max-prompt-length", "128", "--log-interval", "1",
    "--no-probe-memory",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(folder: Path, cache: Path, *options: str, fault: str | None = None) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    environment |= {"OMP_NUM_THREADS": "1"} | ({"SIMPO_FAULT": fault} if fault else {})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, "examples/pretrain_simpo.py", *OPTIONS, *options, "--data-cache", str(cache)],
        cwd=REPOSITORY,
        env=environment,
        stdout=(folder / "out").open("w"),
        stderr=(folder / "err").open("w"),
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float) -> int:
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_steps(folder: Path, job: subprocess.Popen) -> None:
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("grad_norm") >= 2):
        assert job.poll() is None and time.monotonic() < deadline, (folder / "err").read_text()[-3000:]
        time.sleep(0.1)


def test_an_error_on_one_rank_is_one_line_with_its_place_and_torchrun_reports_it_as_the_cause(tmp_path, cache):
    job = start(tmp_path, cache, "--train-iters", "3", fault="forward@2:1:raise")
    assert finish(job, 300) == 1
    err = (tmp_path / "err").read_text()
    (line,) = re.findall("^ERROR simpo_megatron.*", err, re.MULTILINE)
    assert line == "ERROR simpo_megatron rank 1: unexpected InjectedError: injected at forward by SIMPO_FAULT"
    assert re.search(r'File ".*simpo_megatron/mcore/forward_step.py", line \d+, in __call__', err)
    (stopped,) = re.findall("^STOPPED simpo_megatron.*", err, re.MULTILINE)
    assert "rank 0: stopped because rank 1 failed in the evaluation before step 1: InjectedError" in stopped
    root_cause = err.split("Root Cause", 1)[1]
    assert re.search(
        "traceback : (InjectedError: injected at|PeerFailedError: stopped because rank 1 failed)", root_cause
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_leaves_a_whole_checkpoint_of_the_last_whole_step(number, tmp_path, cache):
    job = start(tmp_path, cache, "--train-iters", "500", "--save", str(tmp_path / "run"))
    wait_for_steps(tmp_path, job)
    job.send_signal(number)
    finish(job, 120)
    metrics = tmp_path / "run" / "metrics.jsonl"
    num_steps = metrics.read_text().count("grad_norm")
    (committed,) = (tmp_path / "run").glob("iter_*")
    assert committed.name == f"iter_{num_steps:07d}" and num_steps < 500
    assert (committed / "COMMIT.json").is_file()
    said = re.findall("^STOPPED simpo_megatron.*", (tmp_path / "err").read_text(), re.MULTILINE)
    assert f"{number.name}: stopped after step {num_steps}, saved in" in said[0]
    # Once when it is so, and once more after the pages that torchrun prints.
    deadline = time.monotonic() + 60
    while (tmp_path / "err").read_text().splitlines()[-1] != said[0]:
        assert time.monotonic() < deadline, (tmp_path / "err").read_text()[-3000:]
        time.sleep(0.1)


def test_ranks_do_not_outlive_a_launcher_that_was_killed(tmp_path, cache):
    job = start(tmp_path, cache, "--train-iters", "100000", "--save", str(tmp_path / "run"))
    wait_for_steps(tmp_path, job)
    ranks = psutil.Process(job.pid).children(recursive=True)
    assert len(ranks) >= 2
    job.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    assert alive == []
    (line,) = re.findall("^ERROR simpo_megatron.*", (tmp_path / "err").read_text(), re.MULTILINE)
    assert f"torchrun, process {job.pid}, which started the ranks, is gone" in line or "the ranks' store at" in line
