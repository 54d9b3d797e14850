"""Training by every objective takes the steps of a float64 reference that keeps a copy of the initial model.

The trainer keeps no copy: it computes the reference log-probs before the first step, each data-parallel rank a share.
Budget: 1e-5 relative, as in test_layouts.py; measured at most 5e-7.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM
from twin import TwinSettings, response_log_probs, train, with_context

from simpo_megatron.data import BatchOptions, plan_step

WORKER = Path(__file__).with_name("layout_worker.py")
NUM_RANKS, NUM_STEPS, BATCH = 2, 5, 8
RELATIVE = 1e-5
VOCAB = 259
SETTINGS = TwinSettings()
OPTIONS = SETTINGS.of_trainer(batch_size=BATCH, num_steps=NUM_STEPS)
LAYOUTS = {
    "dpo_dp2": {"objective": "dpo"},
    "dpo_tp2": {"objective": "dpo", "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "dpo_pp2": {"objective": "dpo", "pipeline_model_parallel_size": 2},
    "ipo_dp2": {"objective": "ipo", "tau": 0.5, "use_distributed_optimizer": True},
    "cpo_dp2": {"objective": "cpo"},
    "orpo_tp2": {"objective": "orpo", "odds_ratio_weight": 0.5, "tensor_model_parallel_size": 2},
}


def twin_loss(name: str, initial: torch.nn.Module):
    """The batch loss of an objective at the constants of LAYOUTS, and the mean margin of its rewards."""

    def of_pair(chosen, rejected, chosen_ref, rejected_ref):
        """(loss, likelihood weight, margin) from token log-probs under the policy and the reference."""
        if name == "dpo":
            margin = 0.1 * ((chosen.sum() - chosen_ref.sum()) - (rejected.sum() - rejected_ref.sum()))
            return -F.logsigmoid(margin), 0.0, margin
        if name == "ipo":
            h = (chosen.mean() - chosen_ref.mean()) - (rejected.mean() - rejected_ref.mean())
            return (h - 1 / (2 * 0.5)) ** 2, 0.0, 0.5 * h
        if name == "cpo":
            margin = 0.1 * (chosen.sum() - rejected.sum())
            return -F.logsigmoid(margin), 1.0, margin
        p, q = chosen.mean().exp(), rejected.mean().exp()
        odds_ratio = (p / (1 - p)) / (q / (1 - q))
        return -0.5 * F.logsigmoid(odds_ratio.log()), 1.0, 0.5 * (chosen.mean() - rejected.mean())

    def loss_of(model, pairs, _):
        losses, margins, likelihoods, weight = [], [], [], 0.0
        for prompt, *responses in pairs:
            policy = [response_log_probs(model, prompt, response) for response in responses]
            with torch.no_grad():
                reference = [response_log_probs(initial, prompt, response) for response in responses]
            loss, weight, margin = of_pair(*policy, *reference)
            losses.append(loss)
            margins.append(margin.item())
            likelihoods.append(-policy[0])
        return torch.stack(losses).mean() + weight * torch.cat(likelihoods).mean(), sum(margins) / len(margins)

    return loss_of


def random_pairs(num_pairs: int) -> list[list[list[int]]]:
    random = np.random.default_rng(11)
    lengths = random.integers([1, 1, 1], [14, 18, 18], size=(num_pairs, 3))
    return [[random.integers(1, VOCAB, size=n).tolist() for n in row] for row in lengths]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the initial model, the batches of each step, the folder of the layouts' results)."""
    folder = tmp_path_factory.mktemp("objectives")
    torch.manual_seed(3)
    shape = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=80, max_position_embeddings=64)
    heads = dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    model.save_pretrained(folder / "model")
    pairs = with_context(random_pairs(2 * BATCH + 3))
    job = dict(model=str(folder / "model"), pairs=pairs, num_steps=NUM_STEPS, options=OPTIONS)
    job |= dict(layouts=LAYOUTS, poisoned=[])
    (folder / "job.json").write_text(json.dumps(job))
    run_ranks(WORKER, NUM_RANKS, str(folder), timeout=300)
    options = BatchOptions(global_batch_size=BATCH, tokens_per_microbatch=128)
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    batches = [
        [pairs[i] for rank in plan_step(lengths, step * BATCH, options, dp_size=1) for mb in rank for i in mb]
        for step in range(NUM_STEPS)
    ]
    return model.double(), batches, folder


@pytest.mark.parametrize("objective", ["dpo", "ipo", "cpo", "orpo"])
def test_every_layout_takes_the_twins_steps(runs, objective):
    initial, batches, folder = runs
    loss_of = twin_loss(objective, initial)
    record = train(copy.deepcopy(initial), batches, SETTINGS, loss_of)
    with torch.no_grad():
        _, untrained = loss_of(initial, batches[-1], SETTINGS)
    assert record.margin[-1] > untrained + 0.05, "it learns, so that agreeing with it means something"
    for name in (layout for layout in LAYOUTS if layout.startswith(objective)):
        steps = json.loads((folder / f"{name}.json").read_text())
        for key, expected in (
            ("loss", record.loss),
            ("grad_norm", record.grad_norm),
            ("rewards/margins", record.margin),
        ):
            error = np.abs(np.array([step[key] for step in steps]) - expected) / np.maximum(np.abs(expected), 1.0)
            print(f"{name}: {key} is off by {error.max():.1e}")
            assert np.all(error <= RELATIVE), f"{name}: {key} is off by {error}"
