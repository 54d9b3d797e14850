"""The one command with adapters, as a user types it: it learns, and leaves adapters and a merged model that agree."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from test_pretrain import records_of, torchrun
from transformers import AutoModelForCausalLM


def test_adapters_learn_and_leave_a_merged_model(tmp_path):
    options = ["--tp", "2", "--lora-rank", "8", "--lora-alpha", "16", "--train-iters", "16", "--log-interval", "4"]
    options += ["--save", str(tmp_path / "run"), "--data-cache", str(tmp_path / "cache")]
    options += ["--export-hf", str(tmp_path / "hf"), "--export-adapter", str(tmp_path / "adapter")]
    options += ["--export-dtype", "stored"]
    done = torchrun("--nproc-per-node", "2", "examples/pretrain_simpo.py", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "trained   69,632 of 1,179,520 parameters (5.90%): adapters of rank 8 on linear_qkv" in done.stdout
    _, evaluations = records_of(tmp_path)
    before, after = (evaluations[at]["eval/rewards/accuracies"] for at in (0, -1))
    assert after > before + 0.1, evaluations

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 16)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, merged = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (settings["base_model_name_or_path"], tmp_path / "hf")
    )
    module = "model.layers.3.mlp.down_proj"
    A, B = (adapter[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    assert B.abs().max() > 0
    torch.testing.assert_close(merged[f"{module}.weight"], base[f"{module}.weight"] + 2 * B @ A, rtol=0, atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
