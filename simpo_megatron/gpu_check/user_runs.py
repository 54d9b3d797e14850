"""Runs of `simpo train` as a user starts them, and their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron import faults
from simpo_megatron.gpu_check.verdict import CheckSetting

Ended = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class SmallRun:
    """A run of `simpo train OPTIONS --save FOLDER`, with a fault of faults.py if one is given."""

    folder: Path
    options: tuple[str, ...]
    fault: str | None = None
    compiles: bool = True
    """False: megatron's fused functions run as they are written, for compiling them takes longer than the run."""


def train(setting: CheckSetting, run: SmallRun) -> Ended:
    """The result of `run` in a process of its own, on this check's device."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if setting.rehearse else {}
    environment |= {} if run.fault is None else {faults.VARIABLE: run.fault}
    environment |= {} if run.compiles else {"TORCH_COMPILE_DISABLE": "1"}
    cache = ["--data-cache", str(setting.folder / "cache")]
    return subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "simpo_megatron", "train", *run.options, *cache, "--save", str(run.folder)],
        cwd=setting.folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def train_side_by_side(setting: CheckSetting, *runs: SmallRun) -> list[Ended]:
    """The results of small runs at the same time on this device; they take longer to start than to compute."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda run: train(setting, run), runs))


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; none without a file."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def last_line(done: Ended) -> str:
    """The last line of stderr, or of stdout where stderr is empty."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1][:300] if lines else ""
