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
    command = [sys.executable, "-m", "simpo_megatron", "train", *run.options, *cache, "--save", str(run.folder)]
    lines = []
    with subprocess.Popen(  # noqa: S603 - our own command
        command, cwd=setting.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # Into the log at once: a run that hangs is ended together with this process.
            print(line, end="", flush=True)
            lines.append(line)
    return Ended(command, process.returncode, "".join(lines))


def train_side_by_side(setting: CheckSetting, *runs: SmallRun) -> list[Ended]:
    """The results of small runs at the same time on this device; they take longer to start than to compute."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda run: train(setting, run), runs))


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; none without a file."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def last_line(done: Ended) -> str:
    """The last line of a run that begins with ERROR, or else its last one."""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return [*lines, *errors][-1][:300] if lines else ""
