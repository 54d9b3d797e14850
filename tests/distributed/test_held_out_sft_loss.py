"""The likelihood of held-out answers is a figure of the pairs and the model, not of how pairs are put into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layout_worker import ListDataset
from transformers import AutoModelForCausalLM, LlamaConfig

from simpo_megatron import parallel
from simpo_megatron.config import Machine, config_from, resolve
from simpo_megatron.convert import load_hf_weights
from simpo_megatron.mcore.families import describe_hf_model
from simpo_megatron.mcore.model import build_model
from simpo_megatron.training.start.setup import build_trainer
from simpo_megatron.training.step import batch_options, evaluate, validation_log_probs
from simpo_megatron.training.step.evaluation import Evaluation


def evaluation(folder: str, pairs: ListDataset, groups: parallel.ParallelGroups, **batch: int) -> Evaluation:
    config = config_from(model=folder, data=("unused",), bf16=False, sft_weight=0.5, **batch)
    parallel.seed_everything(1)
    description = describe_hf_model(folder)
    layout = resolve(config, world_size=1, model=description.transformer, machine=Machine())
    chunks = build_model(description, config, groups)
    load_hf_weights(chunks, folder, description, tp_rank=0, tp_size=1)
    trainer = build_trainer(chunks, config, groups, layout, batch_options(config, layout, pad_id=0), train_iters=1)
    sets = {"": pairs}
    return evaluate(trainer, sets, validation_log_probs(trainer, sets))


def test_the_held_out_likelihood_is_the_mean_over_all_chosen_tokens_in_batches_of_any_size(tmp_path) -> None:
    torch.manual_seed(2)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=131, **sizes)).save_pretrained(tmp_path)
    random = np.random.default_rng(3)
    # Answers of one token and of thirty, so that a mean of the batches' means is another number.
    lengths = [(5, count, 9) for count in (1, 30, 2, 28, 3, 1, 30)]
    pairs = ListDataset([[random.integers(1, 131, size=count).tolist() for count in pair] for pair in lengths])
    with parallel.alone() as groups:
        few, many = (
            evaluation(str(tmp_path), pairs, groups, global_batch_size=size, tokens_per_microbatch=2048)
            for size in (2, 5)
        )
    counts = np.array([count for _, count, _ in lengths])
    expected = -(few.averages[:, 0].astype(float) * counts).sum() / counts.sum()
    for found in (few, many):
        assert found.metrics["eval/sft_loss"] == pytest.approx(expected, rel=1e-6)
