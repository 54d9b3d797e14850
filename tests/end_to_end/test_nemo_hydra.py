"""The example under NeMo's own hydra_runner and exp_manager: megatron-core trains, NeMo's folder and loggers fill."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from ranks import python_output
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MISSING = [name for name in ("nemo", "hydra", "lightning", "einops", "sentencepiece") if find_spec(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'simpo-megatron[nemo]'"
)


def test_two_ranks_train_as_a_nemo_experiment(tmp_path):
    overrides = ["trainer.devices=2", "trainer.max_steps=3", "trainer.log_every_n_steps=1"]
    overrides += ["model.tensor_model_parallel_size=2", "model.simpo.beta=2.5", f"exp_manager.exp_dir={tmp_path}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = python_output(*torchrun, "examples/nemo_hydra.py", *overrides, timeout=580)
    assert "taken       model.simpo.beta -> beta=2.5" in printed
    experiment = tmp_path / "simpo"
    assert "model.simpo.beta=2.5" in (experiment / "cmd-args.log").read_text()
    records = map(json.loads, (experiment / "megatron" / "metrics.jsonl").read_text().splitlines())
    losses = {record["iteration"]: record["loss"] for record in records if "loss" in record}
    assert sorted(losses) == [1, 2, 3]
    (events,) = experiment.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    assert {event.step: event.value for event in board.Scalars("loss")} == pytest.approx(losses)
    assert "eval/rewards/accuracies" in board.Tags()["scalars"]
