"""The example for loops of one's own runs as printed, without megatron, and learns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "your_own_loop.py"


def test_a_plain_torch_loop_learns_the_preference_without_megatron():
    program = (
        f"import runpy, sys; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__');"
        "assert not {'megatron', 'transformers', 'yaml'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"loss ([\d.]+)  accuracy ([\d.]+)", done.stdout)
    assert len(steps) == 4, done.stdout
    # An untrained model is at about log(1 + e) = 1.31; a fifth of it means margins far beyond the target.
    assert float(steps[0][0]) > 1.0 and float(steps[-1][0]) < 0.25
    assert float(steps[-1][1]) == 1.0
