"""The real model of these tests, made once for all of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from extras import installed_alone
from filelock import FileLock
from ranks import REPOSITORY


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct: the folder SIMPO_SMOLLM2 names, or one made from the package that carries the model."""
    own = tmp_path_factory.getbasetemp()
    # Workers of one session have folders of their own in one that they share.
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = Path(os.environ.get("SIMPO_SMOLLM2") or shared / "smollm2")
    tool = REPOSITORY / "tools" / "prepare_smollm2.py"
    with FileLock(shared / "smollm2.lock"):
        # As `make demo-smollm2` does, with the packages of this extra and no others.
        python = installed_alone(own / "packages_of_gguf", "gguf")
        done = subprocess.run([*python, str(tool), str(folder)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return folder
