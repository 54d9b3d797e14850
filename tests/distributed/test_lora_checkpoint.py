"""A run with adapters that stops and resumes is the run that never stopped, though its checkpoints lack the base.

As in test_checkpoint.py: bit for bit in the same layout, exactly what was written in another.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_checkpoint import finished, learned, metrics, outcome, pairs_seen, record, resumed, state
from transformers import LlamaConfig, LlamaForCausalLM

from simpo_megatron.demo import prepare_demo

WORKER = Path(__file__).with_name("checkpoint_worker.py")
NUM_STEPS, RANK = 3, 4
TP2 = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "use_distributed_optimizer": True,
    "hidden_dropout": 0.1,
    "lora_dropout": 0.1,
}
PP2 = {**TP2, "tensor_model_parallel_size": 1, "sequence_parallel": False, "pipeline_model_parallel_size": 2}
DP2 = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "bf16": True}
RUNS = [
    {"name": "tp2", "options": TP2},
    resumed("tp2_at_2", "tp2", 2, TP2),
    resumed("tp2_to_pp2", "tp2", 2, PP2, write_again=True),
    {"name": "dp2", "options": DP2},
    resumed("dp2_at_2", "dp2", 2, DP2),
    resumed("other_base", "tp2", 2, {**TP2, "model": "other"}),
    resumed("no_adapters", "tp2", 2, {**TP2, "lora_rank": None, "lora_dropout": 0.0}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora_checkpoints")
    demo = prepare_demo(folder / "demo")
    for name, seed in (("model", 3), ("other", 4)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1100,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=False,
                max_position_embeddings=256,
            )
        )
        shutil.copytree(demo.model_dir, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(folder / name)
    pairs = Path(demo.train_file).read_text().splitlines()[:20]
    (folder / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    options = {
        "model": "model",
        "data": [str(folder / "pairs.jsonl")],
        "data_cache": str(folder / "cache"),
        "bf16": False,
        "lora_rank": RANK,
        "global_batch_size": 8,
        "max_length": 256,
        "max_prompt_length": 128,
        "tokens_per_microbatch": 512,
        "lr": 1e-2,
        "train_iters": NUM_STEPS,
        "save_interval": 1,
        "keep_checkpoints": 9,
    }
    runs = [{**run, "options": {**options, **run["options"]}} for run in RUNS]
    for run in runs:
        run["options"]["model"] = str(folder / run["options"]["model"])
    (folder / "runs.json").write_text(json.dumps(runs))
    run_ranks(WORKER, 1, str(folder), timeout=420)
    return folder


@pytest.mark.parametrize(("whole", "name", "at"), [("tp2", "tp2_at_2", 2), ("dp2", "dp2_at_2", 2)])
def test_a_resume_in_the_same_layout_is_bit_identical(folder, whole, name, at):
    finished(folder, whole)
    assert "adapters are those of the checkpoint" in finished(folder, name)
    for step in range(at + 1, NUM_STEPS + 1):
        assert state(folder, name, step) == state(folder, whole, step)
    assert metrics(folder, name) == metrics(folder, whole)
    assert pairs_seen(folder, name) == pairs_seen(folder, whole)[at:]
    hashes = [json.dumps(state(folder, whole, step)) for step in range(1, NUM_STEPS + 1)]
    assert len(set(hashes)) == NUM_STEPS


def test_a_checkpoint_holds_adapters_and_their_moments_alone(folder):
    tensors = learned(folder / "tp2" / "iter_0000002")
    weights = {name for name in tensors if not name.startswith("optimizer.")}
    assert len(weights) == 8 and all("_adapter.lora_" in name for name in weights), weights
    sizes = {"linear_qkv": 32 + 64, "linear_proj": 32 + 32, "linear_fc1": 32 + 96, "linear_fc2": 48 + 32}
    assert sum(tensors[name].numel() for name in weights) == 2 * RANK * sum(sizes.values())
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in tensors)


def test_another_layout_reads_exactly_what_was_written(folder):
    finished(folder, "tp2_to_pp2")
    written, read = learned(folder / "tp2" / "iter_0000002"), learned(folder / "tp2_to_pp2.state")
    assert set(read) == set(written)
    for name, expected in written.items():
        assert torch.equal(read[name], expected), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other_base", "model.base_model"),
        ("no_adapters", "model.lora_rank: 4 when saved, None now"),
    ],
)
def test_what_the_adapters_were_not_trained_on_is_refused(folder, name, said):
    codes, output = outcome(folder, name)
    assert codes == [4, 4] and said in output and "these cannot change within a run" in output
    assert record(folder, "tp2", 2)["facts"]["model"]["base_model"].startswith("sha256:")
