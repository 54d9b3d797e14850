"""Training from python, without torchrun: several runs in one process, a result for each, one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from counts import check_counts
from ranks import REPOSITORY

from simpo_megatron.demo import demo_version, prepare_demo

SMALL = "train_iters=2, log_interval=1, global_batch_size=8, max_length=256, max_prompt_length=128"
LONGER = SMALL.replace("train_iters=2", "train_iters=4")
# Packages and parts of them that take long to import, and that no step of a small model needs. torch's optimizers load
# dynamo by themselves.
UNUSED = (
    "torch._inductor.compile_fx",
    "torch._functorch.aot_autograd",
    "networkx",
    "matplotlib",
    "datasets",
    "pandas",
    "transformers.modeling_utils",
    "megatron.training",
    "simpo_megatron.nemo",
    "simpo_megatron.reporting.model_card",
)
# A run that a signal stops; the example with few steps; a mistake and a layout of more ranks; the first run again.
PROGRAM = f"""
import os, runpy, signal, sys
from simpo_megatron import load_config, train
from simpo_megatron.errors import ConfigError, DataError, StoppedBySignal
import torch.distributed as dist

class Interrupts:
    def write(self, record):
        if "grad_norm" in record and record["iteration"] == 1:
            print("LOADED", len(sys.modules), *(name for name in {UNUSED!r} if name in sys.modules))
            os.kill(os.getpid(), signal.SIGINT)
    def close(self):
        pass

try:
    train(load_config({LONGER}, data_cache="cache", save="runs/stopped"), [Interrupts()])
except StoppedBySignal as stopped:
    print("STOPPED", stopped.result)

runpy.run_path({str(REPOSITORY / "examples" / "sweep_two_settings.py")!r})["main"]({SMALL}, data_cache="cache")
for wrong in (dict(tp=2), dict(data=["none.jsonl"], model="none"), dict(valid_data=["none.jsonl"])):
    try:
        train(load_config({SMALL}, data_cache="cache", **wrong))
    except (ConfigError, DataError) as error:
        print("REFUSED", error)
    assert not dist.is_initialized()
again = dict(beta=2.0, data_cache="cache", save="runs/sweep/beta_2", export_hf="runs/again", resume="required")
again = train(load_config({SMALL}, **again))
print("AGAIN", again)
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """(what the program printed, its folder)."""
    folder = tmp_path_factory.mktemp("plain")
    prepare_demo(folder / "cache" / f"demo-{demo_version()}")
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines(), folder


def test_the_first_step_has_loaded_nothing_that_it_does_without(lines):
    (loaded,) = [line for line in lines[0] if line.startswith("LOADED")]
    _, num_modules, *unused = loaded.split()
    assert unused == []
    check_counts("modules", {"a first step": int(num_modules)}, may_rise=1 / 7)


def test_the_time_of_the_start_is_said_once(lines):
    (told,) = [line for line in lines[0] if line.startswith("start ")]
    assert re.search(r"first step done \S+ s after this process began .*; longest phase: \w.*, \S+ s; ", told)


def test_a_sweep_of_two_settings_in_one_process_prints_both_results(lines):
    printed, folder = lines
    results = [line for line in printed if line.startswith("beta ")]
    for line, beta in zip(results, (2, 10), strict=True):
        assert re.fullmatch(rf"beta {beta}: accuracy from [0-9.]+% to [0-9.]+%, best in runs/.*/iter_0000002", line)
        assert (folder / "runs" / "sweep" / f"beta_{beta}" / "hf" / "config.json").is_file()
        records = [json.loads(text) for text in (folder / f"runs/sweep/beta_{beta}/metrics.jsonl").open()]
        shares = [f"{record['eval/rewards/accuracies']:.1%}" for record in records if "eval/loss" in record]
        assert line.startswith(f"beta {beta}: accuracy from {shares[0]} to {shares[-1]},")


def test_what_cannot_be_run_is_refused_in_one_line_and_the_process_can_train_again(lines):
    ranks, model, validation = [line for line in lines[0] if line.startswith("REFUSED")]
    assert "found 1, expected 2 for this layout" in ranks and "`simpo train`" in ranks
    assert "none" in model and "none.jsonl: found no such file" in validation


def test_a_run_that_ended_before_is_resumed_and_gives_the_same_result(lines):
    printed, folder = lines
    (again,) = [line for line in printed if line.startswith("AGAIN RunResult(")]
    first = json.loads((folder / "runs/sweep/beta_2/metrics.jsonl").read_text().splitlines()[0])
    assert f"before={{'eval/loss': {first['eval/loss']!r}, " in again
    assert "last_checkpoint=PosixPath('runs/sweep/beta_2/iter_0000002')" in again
    assert "export_folder=PosixPath('runs/again')" in again and again.endswith("exit_reason='done')")


def test_an_interrupt_stops_after_a_whole_step_saved_and_the_exception_carries_the_result(lines):
    printed, folder = lines
    (stopped,) = [line for line in printed if line.startswith("STOPPED RunResult(")]
    assert "last_checkpoint=PosixPath('runs/stopped/iter_0000001')" in stopped
    assert "export_folder=None, exit_reason='stopped by signal')" in stopped
    assert Path(folder, "runs/stopped/iter_0000001/COMMIT.json").is_file()
