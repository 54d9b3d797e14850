"""A real model takes two steps on preference pairs by the command of `make demo-smollm2`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY

pytestmark = pytest.mark.slow


def test_a_real_model_takes_two_steps(smollm2: Path, tmp_path: Path):
    pairs = os.environ.get("SIMPO_REAL_PAIRS") or "demo"
    if Path(pairs).is_dir():
        pairs = str(sorted(Path(pairs).glob("*.jsonl"))[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(REPOSITORY / "examples" / "pretrain_simpo.py")]
    command += ["--config", str(REPOSITORY / "configs" / "smollm2_cpu.yaml"), "--model", str(smollm2)]
    command += ["--data", pairs, "--bad-record", "skip", "--max-length", "96", "--max-prompt-length", "48"]
    command += [
        "--global-batch-size",
        "4",
        "--tokens-per-microbatch",
        "256",
        "--train-iters",
        "2",
        "--eval-interval",
        "2",
        "--log-interval",
        "1",
    ]
    command += ["--valid-fraction", "0.005", "--save-interval", "2"]
    command += ["--save", str(tmp_path / "run"), "--export-hf", str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval/loss" in record]
    assert [record["iteration"] for record in steps] == [1, 2]
    assert [record["iteration"] for record in evaluations] == [0, 2]
    # An instruct model speaks a language: its answers cost one to four nats a token, not ln(49152) = 10.8.
    assert all(-5 < record["logps/chosen"] < -0.5 for record in steps)
    assert (tmp_path / "hf" / "model.safetensors").is_file()
