"""examples/launch/slurm.sbatch on a real Slurm of two nodes: told, preempted, broken on one node, and queued again."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import cluster as slurm
import pytest
from ranks import REPOSITORY

from simpo_megatron.demo import prepare_demo

SCRIPT = REPOSITORY / "examples" / "launch" / "slurm.sbatch"
OPTIONS = [
    "--fp32", "--global-batch-size", "8", "--tokens-per-microbatch", "512", "--max-length", "256",
    "--max-prompt-length", "128", "--log-interval", "1", "--no-probe-memory", "--tp", "2", "--model", "model",
    "--data", "pairs.jsonl", "--data-cache", "cache", "--train-iters", "100000",
]  # fmt: skip
# A start of python and its imports on a machine that does other things as well.
START_SECONDS = 240

pytestmark = [
    pytest.mark.skipif("SIMPO_SLURM" not in os.environ, reason="make test-slurm runs these"),
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to submit from, which is not the repository, and the environment of the jobs."""
    place = tmp_path_factory.mktemp("place")
    demo = prepare_demo(place / "demo")
    (place / "model").symlink_to(demo.model_dir)
    (place / "pairs.jsonl").write_text(Path(demo.train_file).read_text())
    commands = place / "bin"
    commands.mkdir()
    # The second node sees another folder where it is told so.
    (commands / "python").write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" != "${{EMPTY_NODE:-}}" ] || cd "{commands}"\nexec {sys.executable} "$@"\n'
    )
    (commands / "python").chmod(0o755)
    (place / "activate").write_text(f'export PATH="{commands}:$PATH" PYTHONPATH="{REPOSITORY}"\n')
    return place


def submit(cluster, place, *options, before=(), **variables):
    """The number of the job, and where it logs."""
    command = ["sbatch", "--parsable", "--nodes", "2", *before, str(SCRIPT), *OPTIONS, *options]
    given = {"ACTIVATE": "activate", "PER_NODE": "1", "OMP_NUM_THREADS": "1"} | variables
    number = cluster.run(*command, folder=place, **given).strip()
    return number, place / f"simpo-{number}.log"


def steps(run):
    file = run / "metrics.jsonl"
    return file.read_text().count("grad_norm") if file.exists() else 0


def logged(log):
    return log.read_text() if log.exists() else ""


def wait_for_end(cluster, number, log, seconds):
    cluster.wait(lambda: cluster.job(number)["JobState"] in ("FAILED", "COMPLETED", "CANCELLED"), seconds)
    print(logged(log)[-3000:])
    return cluster.job(number)


def test_a_job_that_is_told_or_preempted_is_saved_queued_again_and_continues(cluster, place):
    """The job is part of an array, in a folder of its own, activated by a variable, without GRES in the cluster."""
    array, _ = submit(cluster, place, "--save", "runs/seed_%a", "--seed", "4%a", before=["--array", "3-3"])
    number, run = f"{array}_3", place / "runs" / "seed_3"
    job = cluster.job(number)["JobId"]
    log = place / f"simpo-{job}.log"
    try:
        cluster.wait(lambda: steps(run) >= 2, START_SECONDS)
        assert "seed: 43" in (run / "config.yaml").read_text()
        cluster.run("scancel", "--full", "--signal", "USR1", job)
        cluster.wait(lambda: int(cluster.job(number)["Restarts"]) == 1, START_SECONDS)
        (stopped,) = re.findall(r"^STOPPED .*", logged(log), re.MULTILINE)
        saved = int(re.search(r"SIGUSR1: stopped after step (\d+), saved in .*seed_3/iter_0*\1;", stopped)[1])
        cluster.wait(lambda: steps(run) >= saved + 2, START_SECONDS)
        assert f"resume    from runs/seed_3/iter_{saved:07d}: step {saved}" in logged(log)
        # No grace: SIGTERM twice within moments, and SIGKILL after KillWait.
        cluster.run("sbatch", "-p", "high", "-N", "2", "--exclusive", "--wrap", "sleep 1")
        # Slurm counts the start that is to come when it begins to end the job.
        cluster.wait(lambda: int(cluster.job(number)["Restarts"]) == 2, START_SECONDS)
        cluster.wait(lambda: "SIGTERM: stopped after step" in logged(log), START_SECONDS)
        stopped = re.findall(r"^STOPPED .*", logged(log), re.MULTILINE)
        assert len(stopped) == 2 and re.search(r"SIGTERM: stopped after step \d+, saved in", stopped[1])
    finally:
        cluster.run("scancel", array)


def test_what_one_node_does_not_see_ends_the_job_with_a_line_and_no_other_start(cluster, place):
    begun = time.monotonic()
    number, log = submit(cluster, place, "--save", str(place / "runs" / "broken"), EMPTY_NODE="n2")
    job = wait_for_end(cluster, number, log, START_SECONDS)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "4:0", "0"), time.monotonic() - begun
    assert re.search(r"^ERROR simpo_megatron rank 1: model/config.json: found no such file", logged(log), re.MULTILINE)
    assert re.search(r"^STOPPED simpo_megatron rank 0: stopped because rank 1 failed", logged(log), re.MULTILINE)


def test_a_signal_before_the_first_step_queues_the_job_again(cluster, place):
    number, log = submit(cluster, place, "--save", str(place / "runs" / "early"))
    try:
        cluster.wait(lambda: cluster.job(number)["JobState"] == "RUNNING", 60)
        time.sleep(3)
        cluster.run("scancel", "--signal", "USR1", number)
        cluster.wait(lambda: int(cluster.job(number)["Restarts"]) == 1, START_SECONDS)
        print(logged(log)[-3000:])
        assert steps(place / "runs" / "early") == 0
    finally:
        cluster.run("scancel", number)


def test_a_job_that_would_start_over_each_time_is_refused(cluster, place):
    number, log = submit(cluster, place)
    job = wait_for_end(cluster, number, log, START_SECONDS)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    (line,) = re.findall(r"^ERROR .*", logged(log), re.MULTILINE)
    assert "save: found none in a job that starts again after a stop" in line and "sbatch --no-requeue" in line
