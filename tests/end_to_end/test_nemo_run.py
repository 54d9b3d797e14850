"""A NeMo-Run recipe: changed like any other, and run by NeMo-Run's own local executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from simpo_megatron.config import config_from
from simpo_megatron.errors import ConfigError
from simpo_megatron.recipes import simpo_recipe
from simpo_megatron.training.run import train

REPOSITORY = Path(__file__).resolve().parents[2]
needs_nemo_run = pytest.mark.skipif(
    find_spec("nemo_run") is None, reason="nemo_run not installed: pip install 'simpo-megatron[nemo-run]'"
)


def test_without_nemo_run_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(ConfigError, match=r"pip install 'simpo-megatron\[nemo-run\]'"):
        simpo_recipe(preset="demo")


@needs_nemo_run
def test_a_recipe_is_the_configuration_and_can_be_changed():
    import fiddle

    options = dict(preset="llama3-instruct", model="folder", data=("a.jsonl",), tp=8, sequence_parallel=True)
    recipe = simpo_recipe(**options)
    built = fiddle.build(recipe)
    assert (built.func, built.keywords["config"]) == (train, config_from(**options))
    recipe.config.optimizer.lr = 3e-7
    assert fiddle.build(recipe).keywords["config"] == config_from(**options, lr=3e-7)
    recipe.config.objective.beta = -1
    with pytest.raises(ConfigError, match="beta: found -1"):
        fiddle.build(recipe)


@needs_nemo_run
def test_the_local_executor_trains_it_on_two_ranks(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "nemo_run_simpo.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": path, "NEMORUN_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    folder = tmp_path / "runs" / "nemo_run"
    assert (folder / "metrics.jsonl").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    records = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    assert [record["iteration"] for record in records if "loss" in record][-1] == 24
    evaluations = [record["eval/rewards/accuracies"] for record in records if "eval/rewards/accuracies" in record]
    assert evaluations[-1] > max(0.8, evaluations[0])
    saved = (folder / "config.yaml").read_text()
    assert "beta: 2.5" in saved and "tensor_model_parallel_size: 2" in saved
    assert (folder / "hf" / "model.safetensors").exists()
