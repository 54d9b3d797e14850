"""The benchmark of the loss runs, and its methods compute the same gradient."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
def test_the_table_has_a_row_for_every_method_with_gradients_that_agree():
    command = [sys.executable, "tools/benchmarks/loss.py", "--shape", "16x300:4x32", "--rounds", "1"]
    command += ["--methods", "ours,princeton"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["method", "ours", "princeton"]
    # fp32 sums of 300 terms against float64.
    assert all(float(row[3]) < 5e-6 for row in rows[1:])
