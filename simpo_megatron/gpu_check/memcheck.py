"""The loss's kernels under NVIDIA's compute-sanitizer, which sees reads and writes outside of a tensor."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict

_SCRIPT = """
from pathlib import Path
from simpo_megatron.gpu_check.loss_exactness import check_exactness
from simpo_megatron.gpu_check.verdict import CheckSetting
import dataclasses, torch
class Tiny(CheckSetting):
    device = property(lambda self: torch.device("cuda"))
raise SystemExit(check_exactness(Tiny(folder=Path("."), rehearse=True)).result != "PASS")
"""


def check_memory_accesses(setting: CheckSetting) -> Verdict:
    """No access outside of a tensor in the exactness cases at their tiny size."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if setting.rehearse or sanitizer is None or importlib.util.find_spec("triton") is None:
        return Verdict.skip("compute-sanitizer, Triton and a GPU are not all here")
    done = subprocess.run(  # noqa: S603 - a tool of CUDA
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", _SCRIPT],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return Verdict.of(done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}", "0 errors")
