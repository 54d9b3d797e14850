"""A model answers, a reward model scores, the trainer learns from the pairs: the way of the instruct settings."""

from __future__ import annotations

import json

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from simpo_megatron import load_config, train
from simpo_megatron.commands import generate, inspect, pairs
from simpo_megatron.demo import prepare_demo
from simpo_megatron.reporting.validation_pairs import read_validation_pairs


def test_the_trainer_learns_from_a_models_own_answers(tmp_path, capsys):
    demo = prepare_demo(tmp_path / "demo")
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir)
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    reward_model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape)
    )
    reward_model.save_pretrained(tmp_path / "reward_model")
    tokenizer.save_pretrained(tmp_path / "reward_model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(demo.train_file.read_text().splitlines(keepends=True)[:8]))

    model, answers = str(demo.model_dir), str(tmp_path / "answers")
    asked = ["--model", model, "--prompts", str(prompts), "--samples", "2", "--temperature", "1"]
    assert generate.main([*asked, "--max-new-tokens", "8", "--out", answers]) == 0
    scored = ["--answers", answers, "--reward-model", str(tmp_path / "reward_model"), "--keep-cut"]
    assert pairs.main([*scored, "--out", str(tmp_path / "pairs")]) == 0
    file = tmp_path / "pairs" / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 8 and all(row["chosen_score"] > row["rejected_score"] for row in rows)

    capsys.readouterr()
    assert inspect.main(["--model", model, "--data", str(file), "--fp32"]) == 0
    told = capsys.readouterr().out
    assert "8 of 8" in told and "pairs with scores" in told and "WARNING" not in told

    save = str(tmp_path / "run")
    config = load_config(
        model=model,
        data=[str(file)],
        valid_data=[str(file)],
        bf16=False,
        global_batch_size=8,
        train_iters=4,
        lr=1e-3,
        max_length=256,
        max_prompt_length=128,
        tokens_per_microbatch=512,
        save=save,
    )
    result = train(config)
    assert result.after["eval/loss"] < result.before["eval/loss"]
    kept = read_validation_pairs(tmp_path / "run")
    gaps = kept.after[:, 0] - kept.after[:, 1]
    assert (kept.iteration, len(gaps)) == (4, 8)
    assert result.after["eval/rewards/accuracies"] == np.mean(gaps > 0)
