"""The one command with adapters, as a user types it: it learns, and leaves adapters and a merged model that agree.

What it leaves is read again by every door: merged offline, as the model of a run, and as adapters that go on training.
"""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_pretrain import records_of, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo_megatron import load_config, train
from simpo_megatron.commands import convert, merge, verify


def test_adapters_learn_and_every_door_reads_what_they_leave(tmp_path, capsys):
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

    doors_read_the_run(tmp_path, capsys)
    runs_begin_where_it_ended(tmp_path, evaluations[-1])
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft" and "Adapters (LoRA) for" in card.text
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template
    assert "WARNING   base_model_name_or_path: found the local folder" in done.stdout


def doors_read_the_run(folder, capsys):
    """Merged offline, the run and its exported adapters are the model that it exported itself, bit for bit."""
    run, adapter, exported, out = (folder / name for name in ("run", "adapter", "hf", "out"))
    assert convert.main(["mcore-to-hf", str(run), str(out), "--dtype", "stored"]) == 0
    assert f"NOTE the adapters in {run}/iter_0000016 are added" in capsys.readouterr().out
    assert verify.main([str(run), str(exported)]) == 0 and verify.main([str(run), str(out)]) == 0
    assert verify.main([str(adapter), str(run)]) == 0
    assert merge.main([str(folder / "mean"), str(run), str(adapter)]) == 0
    assert verify.main([str(folder / "mean"), str(exported)]) == 0
    assert "tensors are equal in every byte" in capsys.readouterr().out


def runs_begin_where_it_ended(folder, after):
    """The first evaluation of runs that start from the adapters is the last one of the run that left them.

    Budget: fp32 on one rank, where the first run had two.
    """
    for option, named in (("adapter", "adapter"), ("model", "run")):
        places = {"save": str(folder / f"from_{option}"), "export_hf": str(folder / f"from_{option}_hf")}
        begun = {"preset": "demo", "train_iters": 1, "data_cache": str(folder / "cache"), **places}
        result = train(load_config(**begun, **{option: str(folder / named)}))
        # Beside times and what is measured from a run's own start.
        beside = ("seconds", "displacement")
        figures = {key: after[key] for key in after if key.startswith("eval/") and not key.endswith(beside)}
        assert "eval/loss" in figures and "eval/rewards/margins" in figures
        for key, value in figures.items():
            assert result.before[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (option, key)
