"""Each extra alone is enough for what it is for.

The extra gguf makes the model of tests/smollm2, and without any the whole package is imported
(test_logs.py). `make test-nemo`, `make test-extras`, `make test-eval` and `make docs` install theirs alone, and
test_te_wheels.py reads the wheels of the extra te.
"""

import subprocess

import pytest
from extras import installed_alone
from ranks import REPOSITORY

A_SWEEP = """
from pathlib import Path
from simpo_megatron.sweep.journal import Journal, Outcome
from simpo_megatron.sweep.points import grid, parse_axes
points = grid(parse_axes(["lr=1e-3,2e-3"]))
journal = Journal(Path.cwd(), {})
journal.tell(journal.take(points), Outcome("done", accuracy=0.75))
assert Journal(Path.cwd(), {}).outcomes() == {points[0]: Outcome("done", accuracy=0.75)}
"""
ON_WEIGHTS_AND_BIASES = """
from simpo_megatron.config import load_config
from simpo_megatron.reporting.loggers import WeightsAndBiases
sink = WeightsAndBiases("simpo", load_config(preset="demo"))
sink.write({"iteration": 1, "loss": 1.0})
sink.close()
"""
# A small shape of the benchmark of the loss: every peer computes the gradients of the float64 reference.
BESIDE_ITS_PEERS = f"""
import sys
from argparse import Namespace
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY / "tools" / "benchmarks")!r})
import loss
shape, reference = "32x512:4x64", Path("reference.pt")
loss.write_reference(shape, reference)
for method in ("ours", "trl", "liger", "cce"):
    report = loss.worker(Namespace(worker=method, shape=shape, tp=1, rank=0, reference=reference))
    assert report.get("error", 1) < 1e-5, (method, report)
"""
pytestmark = pytest.mark.processes

USES = {"sweep": A_SWEEP, "wandb": ON_WEIGHTS_AND_BIASES, "bench": BESIDE_ITS_PEERS}


@pytest.mark.parametrize("extra", USES)
def test_an_extra_alone_is_enough(extra, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    python = installed_alone(tmp_path / "packages", extra)
    done = subprocess.run([*python, "-c", USES[extra]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_what_is_not_required_is_not_there(tmp_path):
    python = installed_alone(tmp_path / "packages")
    for module in ("optuna", "gguf", "accelerate", "pytest", "trl", "peft"):
        done = subprocess.run([*python, "-c", f"import {module}"], capture_output=True, text=True, timeout=60)
        assert f"No module named '{module}'" in done.stderr
