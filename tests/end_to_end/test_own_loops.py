"""The examples for loops of one's own run as printed, learn, and take the plain loss's steps."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpo_megatron.demo import prepare_demo

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# fp32 losses of order 1 over some hundred tokens, in other orders of addition: 60 units in the last place.
BUDGET = 60 * 2.0**-23


def load(name: str):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: list[str], folder: Path) -> list[tuple[float, float]]:
    """The (loss, accuracy) of each step that a command prints."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [(float(loss), float(share)) for loss, share in re.findall(r"loss ([\d.]+)  accuracy ([\d.]+)", done.stdout)]


def test_a_plain_torch_loop_learns_the_preference_without_megatron(tmp_path):
    program = (
        f"import runpy, sys; runpy.run_path({str(EXAMPLES / 'your_own_loop.py')!r}, run_name='__main__');"
        "assert not {'megatron', 'transformers', 'yaml'} & set(sys.modules)"
    )
    steps = run(["-c", program], tmp_path)
    assert len(steps) == 4
    # An untrained model is at about log(1 + e) = 1.31; a fifth of it means margins far beyond the target.
    assert steps[0][0] > 1.0 and steps[-1][0] < 0.25
    assert steps[-1][1] == 1.0


def test_a_transformers_model_takes_the_same_steps_alone_and_sharded_by_fsdp2(tmp_path):
    alone = run([str(EXAMPLES / "transformers_loop.py")], tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sharded = run([*launcher, str(EXAMPLES / "fsdp2_simpo.py")], tmp_path)
    assert len(alone) == 5 and alone[0][0] > 1.2 and alone[-1][0] < 0.35
    # Twenty steps of Adam, whose first ones divide small gradients by their own size: some rounding grows.
    assert sharded[0] == pytest.approx(alone[0], abs=2e-6)
    assert sharded == [pytest.approx(step, abs=2e-5) for step in alone]


def test_the_loop_s_loss_and_gradient_are_those_of_whole_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    from simpo_megatron.data import BatchOptions, PairOptions, build_preference_dataset, iterate_steps, load_tokenizer
    from simpo_megatron.loss import SimPOObjective

    demo = prepare_demo(tmp_path)
    tokenizer, pairs = load_tokenizer(str(demo.model_dir)), PairOptions(max_length=512, max_prompt_length=400)
    dataset = build_preference_dataset([str(demo.valid_file)], tokenizer, pairs, tmp_path / "cache")
    options = BatchOptions(global_batch_size=5, micro_batch_size=5, packing=False, prefix_sharing=False)
    (batch,) = next(iterate_steps(dataset, options))
    model = AutoModelForCausalLM.from_pretrained(demo.model_dir)
    objective = SimPOObjective(beta=2.0, gamma_beta_ratio=0.5)

    loss = load("transformers_loop").loss_of(model, batch, objective).loss
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}

    model.zero_grad()
    logp = model(batch.tokens_BS).logits.log_softmax(-1).transpose(0, 1).flatten(0, 1)
    logp_N = logp[batch.rows_N, batch.targets_N]
    counts_R = torch.bincount(batch.sequence_N)
    avg_R = torch.zeros(len(counts_R)).index_add(0, batch.sequence_N, logp_N) / counts_R
    plain = -torch.nn.functional.logsigmoid(2.0 * (avg_R[::2] - avg_R[1::2]) - 1.0).sum()
    plain.backward()

    assert float(loss) == pytest.approx(float(plain), rel=BUDGET)
    for name, weight in model.named_parameters():
        assert (found[name] - weight.grad).norm() <= 1e-5 * weight.grad.norm(), name


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore")  # trl's and transformers' own, of every kind
def test_trl_s_trainer_takes_its_own_steps_with_this_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = load("trl_simpo")
    options = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    options |= {"disable_tqdm": True, "use_cpu": True}
    logs = [
        [entry for entry in example.main(trainer_class, **options).state.log_history if "loss" in entry]
        for trainer_class in (example.CPOTrainer, example.FusedSimPOTrainer)
    ]
    assert len(logs[0]) == 3
    for theirs, ours in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            # Logs are rounded to four digits: one unit of the last of them.
            assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-3), key
