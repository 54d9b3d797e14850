"""A small random model of each family, as transformers makes it, and a tokenizer for them all."""

from __future__ import annotations

from pathlib import Path

import torch
from data_tokenizers import llama3_like
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 259  # prime: divides over no number of ranks
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Name: (configuration, dtype in the file).
DENSE = {
    "llama2_without_groups": (LlamaConfig(**{**TINY, "num_key_value_heads": 8}), "bfloat16"),
    "llama31_scaled_rope": (LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE), "bfloat16"),
    "llama32_tied": (
        LlamaConfig(**TINY, rope_parameters={**LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True),
        "float16",
    ),
    "llama_biases_linear_rope": (
        LlamaConfig(
            **TINY,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        ),
        "float32",
    ),
    "mistral_wide_heads_window": (MistralConfig(**TINY, head_dim=16, sliding_window=8), "bfloat16"),
    "qwen2_tied_windows_above": (
        Qwen2Config(**TINY, tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, max_window_layers=3),
        "bfloat16",
    ),
    "qwen3": (Qwen3Config(**TINY, head_dim=16), "bfloat16"),
    "phi3": (Phi3Config(**TINY), "float32"),
    "phi3_partial_rope": (
        Phi3Config(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "float32",
    ),
    "gemma2": (
        # Caps at which scores and logits of this size bend.
        Gemma2Config(
            **TINY,
            head_dim=16,
            query_pre_attn_scalar=12,
            sliding_window=8,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
        ),
        "bfloat16",
    ),
}
MIXTURES = {
    "mixtral": (MixtralConfig(**TINY, num_local_experts=6, num_experts_per_tok=2), "bfloat16"),
    "qwen3_moe": (
        Qwen3MoeConfig(
            **TINY,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=3,
            moe_intermediate_size=40,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        ),
        "bfloat16",
    ),
    "qwen3_moe_softmax_over_all": (
        Qwen3MoeConfig(**TINY, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40),
        "float32",
    ),
}


def write_model(config: PretrainedConfig, folder: Path, dtype: str) -> None:
    """A model of random weights, none of them zero or one by initialisation, stored in `dtype`."""
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
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
