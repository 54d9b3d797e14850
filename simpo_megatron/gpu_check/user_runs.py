"""Runs of `simpo train` by checks: started as a user starts them, their records read as a user reads them."""

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
    """A run of `simpo train OPTIONS --save FOLDER`, with a fault of faults.py or without."""

    folder: Path
    options: tuple[str, ...]
    fault: str | None = None


def train(setting: CheckSetting, folder: Path, *options: str) -> Ended:
    """`simpo train OPTIONS --save FOLDER` in a process of its own, on this check's device."""
    return _start(setting, SmallRun(folder, options))


def train_side_by_side(setting: CheckSetting, *runs: SmallRun) -> list[Ended]:
    """The ends of runs that share this check's device: small ones, which take longer to start than to compute."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda run: _start(setting, run), runs))


def _start(setting: CheckSetting, run: SmallRun) -> Ended:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if setting.rehearse else {}
    environment |= {} if run.fault is None else {faults.VARIABLE: run.fault}
    cache = ["--data-cache", str(setting.folder / "cache")]
    return subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "simpo_megatron", "train", *run.options, *cache, "--save", str(run.folder)],
        cwd=setting.folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, none of one that wrote none."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def last_line(done: Ended) -> str:
    """The last line that a command printed, of its errors if there are any."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1][:300] if lines else ""
