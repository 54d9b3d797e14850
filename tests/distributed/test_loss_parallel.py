"""The loss on one, two and three gloo ranks against dense float64 autograd: the checks of loss_worker.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ranks import run_ranks

WORKER = Path(__file__).with_name("loss_worker.py")
NUM_RANKS = 3
NAMES = re.findall(r"^def check_(\w+)", WORKER.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The traceback of each failure, by check and rank; all checks share one start."""
    folder = tmp_path_factory.mktemp("loss")
    run_ranks(WORKER, NUM_RANKS, str(folder), timeout=240, fresh=True)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("name", NAMES)
def test_on_three_ranks(reports, name):
    failures = [f"rank {rank}: {report['check_' + name]}" for rank, report in enumerate(reports)]
    assert all(report["check_" + name] == "" for report in reports), "\n".join(failures)
