"""A small random model of each family, as transformers makes it, and a tokenizer for them all."""

from __future__ import annotations

from pathlib import Path

import torch
from data_tokenizers import llama3_like
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from simpo_megatron.mcore.families import FAMILIES
from simpo_megatron.mcore.family import TINY_MODEL

VOCAB = TINY_MODEL["vocab_size"]
# What a file holds; the other models are stored in bf16.
STORED_DTYPES = {
    "llama32_tied": "float16",
    "llama_biases_linear_rope": "float32",
    "phi3": "float32",
    "phi3_partial_rope": "float32",
    "qwen3_moe_softmax_over_all": "float32",
    "glm4_moe": "float32",
    "glm4_moe_groups": "float32",
    "ernie4_5_moe": "float32",
    "ernie4_5_moe_sparse": "float32",
    "deepseek_v3": "float32",
    "deepseek_v3_moonlight": "float32",
}


def _models(*, with_experts: bool) -> dict[str, tuple[PretrainedConfig, str]]:
    """{name: (configuration, dtype in the file)} of the models that prove the families."""
    return {
        name: (AutoConfig.for_model(family.model_type, **{**TINY_MODEL, **keys}), STORED_DTYPES.get(name, "bfloat16"))
        for family in FAMILIES.values()
        for name, keys in family.tests.items()
        if with_experts == any("experts" in key for key in keys)
    }


DENSE, MOES = _models(with_experts=False), _models(with_experts=True)
FIRST_MOES = [name for family in FAMILIES.values() if (name := next(iter(family.tests))) in MOES]
"""One MoE of each family."""


def write_model(config: PretrainedConfig, folder: Path, dtype: str) -> None:
    """A model of random weights, none of them zero or one by initialisation, stored in `dtype`."""
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for values in (*model.parameters(), *biases):
            values.add_(0.1 * torch.randn_like(values))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer of VOCAB tokens: padding, BOS and EOS, and one for each byte."""
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokens = [*names.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def write_llama3(folder: Path, *, generation: dict | None = None, **shape) -> None:
    """A Llama 3 of two layers and random weights, stored in bf16, that ends at either of its two stop ids."""
    tokenizer = llama3_like()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]),
    }
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(tokenizer) + 2, num_hidden_layers=2, **shape, **ids)
    model = LlamaForCausalLM(config).bfloat16()
    model.generation_config = GenerationConfig(**ids, **(generation or {}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
