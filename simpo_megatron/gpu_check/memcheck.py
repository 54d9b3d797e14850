"""The loss's kernels between guards, and under NVIDIA's compute-sanitizer where it is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict

_NUM_ROWS, _WIDTHS = 11, (5, 1037, 4101)
_GUARD = 7777.0
_SCRIPT = """
from simpo_megatron.gpu_check.memcheck import outside
found = outside({!r})
print(*found, sep="; ")
raise SystemExit(bool(found))
"""


def check_memory_accesses(setting: CheckSetting) -> Verdict:
    """Checks in a process of its own that both kernels write to their rows and columns only."""
    if importlib.util.find_spec("triton") is None:
        return Verdict.skip("triton is not installed")
    sanitizer = None if setting.rehearse else _sanitizer()
    prefix = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"] if sanitizer else []
    # A CPU runs the kernels in Triton's interpreter, which must be chosen before Triton is imported.
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if setting.rehearse else {})}
    done = subprocess.run(  # noqa: S603 - our own script, or a tool of CUDA around it
        [*prefix, sys.executable, "-c", _SCRIPT.format(setting.device.type)],
        env=environment,
        capture_output=True,
        text=True,
    )
    how = "compute-sanitizer and guards" if sanitizer else "guards; compute-sanitizer is not installed"
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    value = (
        f"none by {how}" if done.returncode == 0 else f"exit code {done.returncode}: {said[-1][:200] if said else ''}"
    )
    return Verdict.of(done.returncode == 0, value, "no access outside of a tensor")


def _sanitizer() -> str | None:
    toolkit = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(toolkit) if toolkit.is_file() else None)


def outside(device: str) -> list[str]:
    """The cases in which a kernel wrote outside of its tensor, or a wrong value."""
    found = []
    for width in _WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            for cap in (0.0, 30.0):
                case = f"{width} columns, {dtype}, cap {cap:g}"
                found += [f"{case}: {fault}" for fault in _faults(width, dtype, cap, torch.device(device))]
    return found


def _faults(width: int, dtype: torch.dtype, cap: float, device: torch.device) -> list[str]:
    from simpo_megatron.loss.row_kernels import row_stats, slopes

    random = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(_NUM_ROWS, width, generator=random).to(device, dtype)
    targets = torch.randint(0, width, (_NUM_ROWS,), generator=random).to(device)
    logits, out = (_Guarded(_NUM_ROWS, width, dtype, device) for _ in range(2))
    stats = _Guarded(3, _NUM_ROWS, torch.float32, device, stride=_NUM_ROWS)
    logits.inside.copy_(values)
    stats.inside.copy_(torch.tensor([[-torch.inf], [0.0], [-torch.inf]], device=device).expand(3, _NUM_ROWS))
    row_stats(logits.inside, targets, 0, stats.inside, cap)
    exact = values.double() if cap == 0 else cap * torch.tanh(values.double() / cap)
    lse = exact.logsumexp(-1)
    slopes(logits.inside, out.inside, targets, 0, lse.float(), torch.ones(_NUM_ROWS, device=device), cap)
    expected = torch.nn.functional.one_hot(targets, width) - (exact - lse[:, None]).exp()
    expected = expected if cap == 0 else expected * (1 - (exact / cap) ** 2)
    budget = 1e-4 if dtype == torch.float32 else 1e-2
    checks = {
        "row_stats wrote outside": stats.is_intact() and logits.is_intact(),
        "slopes wrote outside": out.is_intact(),
        "row_stats wrote another sum": bool((stats.inside[0] + stats.inside[1].log() - lse).abs().max() <= 1e-4),
        "slopes wrote another slope": bool((out.inside.double() - expected).abs().max() <= budget),
    }
    return [fault for fault, holds in checks.items() if not holds]


class _Guarded:
    """A tensor between guards: rows before and after it, and columns beside it where the stride has room."""

    def __init__(
        self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device, stride: int | None = None
    ) -> None:
        self._all = torch.full((num_rows + 2, stride or width + 9), _GUARD, dtype=dtype, device=device)
        self.inside: Tensor = self._all[1:-1, :width]

    def is_intact(self) -> bool:
        """True when every guard still has its value."""
        around = torch.ones_like(self._all, dtype=torch.bool)
        around[1:-1, : self.inside.shape[1]] = False
        guard = torch.tensor(_GUARD, dtype=self._all.dtype, device=self._all.device)
        return bool((self._all[around] == guard).all())
