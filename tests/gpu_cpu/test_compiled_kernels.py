"""The kernels of the loss, compiled for three generations of GPUs by Triton and its ptxas, which need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; make test-gpu-cpu has it")


@pytest.mark.processes
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_spill_nothing_and_move_16_bytes_at_a_time(capability, tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    del environment["TRITON_INTERPRET"]
    done = subprocess.run(
        [sys.executable, script, str(capability)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 8
    for kernel in kernels:
        assert kernel["STACK"] == 0 and kernel["LOCAL"] == 0, kernel
        # 256 threads of 64 registers: four programs a multiprocessor.
        assert kernel["REG"] <= 64, kernel
        # Rows are read so, and slopes written: what is narrower is a number a row.
        reads = 4 if kernel["kernel"] == "_slopes" else 2
        assert kernel["wide"] >= reads, kernel
