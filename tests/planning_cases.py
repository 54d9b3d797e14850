"""Small models and full packs that the memory model is held against."""

from __future__ import annotations

import numpy as np

from simpo_megatron.config import config_from
from simpo_megatron.mcore.families import ModelDescription, describe_hf_config
from simpo_megatron.planning.shapes import ModelShape, Pack

HF_CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "vocab_size": 1024,
}
PROMPT, RESPONSE = 56, 100


def description_of(case: dict) -> ModelDescription:
    return describe_hf_config(HF_CONFIG | case.get("model", {}), "config.json")


def shape_of(case: dict) -> ModelShape:
    return ModelShape.of(description_of(case))


def pack_of(case: dict) -> Pack:
    prompt, response = case.get("pair", (PROMPT, RESPONSE))
    return Pack.of(config_from(**case["options"]).batch, prompt=prompt, response=response)


def pairs_of(case: dict) -> list:
    """A global batch of pairs of one length, which fill their packs."""
    prompt, response = case.get("pair", (PROMPT, RESPONSE))
    rng = np.random.default_rng(0)
    vocab_size = description_of(case).vocab_size
    return [
        [rng.integers(0, vocab_size, count).tolist() for count in (prompt, response, response)]
        for _ in range(case["options"]["global_batch_size"])
    ]
