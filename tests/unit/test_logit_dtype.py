"""`--logit-dtype float32` takes the rounding of bf16 logits out of the log-probs of megatron's model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from simpo_megatron.config import config_from
from simpo_megatron.data import BatchOptions, TokenizedPair, collate
from simpo_megatron.mcore import cpu_patches


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu_patches.install()


def error_of(logit_dtype: str | None, folder) -> float:
    """The relative error of a bf16 model's log-probs against float64 log-probs from the same hidden states."""
    from simpo_megatron import parallel
    from simpo_megatron.mcore.families import describe_hf_model
    from simpo_megatron.mcore.microbatch import output_of, to_microbatch
    from simpo_megatron.mcore.model import build_model

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    ).save_pretrained(folder)
    config = config_from(model=str(folder), data=("none",), logit_dtype=logit_dtype)
    with parallel.alone() as groups:
        parallel.seed_everything(0)
        (model,) = build_model(describe_hf_model(folder), config, groups)
        with torch.no_grad():
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        seen = []
        model.output_layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        random = np.random.default_rng(1)
        pair = TokenizedPair(*(random.integers(0, 257, n).astype(np.int32) for n in (5, 20, 30)))
        microbatch = to_microbatch(collate([pair], [0], BatchOptions(global_batch_size=1)), torch.device("cpu"))
        labels = microbatch.response_tokens
        with torch.no_grad():
            found = output_of(model, microbatch)
        logits = seen[0][labels.rows_N, 0].double() @ model.output_layer.weight[:257].double().t()
        expected = logits.log_softmax(-1).gather(1, labels.targets_N[:, None])[:, 0]
    return float((found.double() - expected).norm() / expected.norm())


def test_fp32_logits_take_the_rounding_out(tmp_path):
    # A logit rounded to 8 bits is off by up to 2e-3 of it; sums of products of bf16 numbers in fp32 by some 1e-7.
    assert error_of(None, tmp_path) >= 1e-4
    assert error_of("float32", tmp_path) <= 1e-6
