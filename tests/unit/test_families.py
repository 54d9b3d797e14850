"""Each family's config.json becomes megatron's arguments; what it computes differently is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpo_megatron.errors import CheckpointError, ConfigError
from simpo_megatron.mcore.families import describe_hf_model, padded_vocab_size
from simpo_megatron.mcore.hf_files import MAX_JSON_BYTES

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def describe(folder: Path, **changes):
    config = {**LLAMA, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return describe_hf_model(folder)


def test_rope_reads_alike_from_either_major_version_of_transformers(tmp_path: Path) -> None:
    four = describe(tmp_path, rope_theta=500000.0, rope_scaling=LLAMA3_SCALING)
    five = describe(tmp_path, rope_parameters={**LLAMA3_SCALING, "rope_theta": 500000.0})
    assert four.gpt == five.gpt
    assert four.gpt["rotary_base"] == 500000.0
    assert four.gpt["rope_scaling"] is True and four.gpt["rope_scaling_factor"] == 8.0


def test_linear_rope_becomes_an_interpolation_factor(tmp_path: Path) -> None:
    gpt = describe(tmp_path, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}).gpt
    assert gpt["seq_len_interpolation_factor"] == 4.0 and gpt["rope_scaling"] is False


def test_a_llama_without_optional_keys_has_their_defaults(tmp_path: Path) -> None:
    description = describe(tmp_path, num_key_value_heads="absent", tie_word_embeddings="absent")
    assert description.transformer["num_query_groups"] == 32
    assert description.transformer["kv_channels"] == 128
    assert description.gpt["share_embeddings_and_output_weights"] is False
    assert description.gpt["rotary_base"] == 10000.0
    assert description.vocab_size == 128256


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen2"}, {"add_qkv_bias": True, "qk_layernorm": False}),
        ({"model_type": "qwen3", "head_dim": 128}, {"qk_layernorm": True, "kv_channels": 128}),
        ({"model_type": "mistral", "sliding_window": None, "head_dim": 64}, {"kv_channels": 64}),
        ({"model_type": "mistral", "sliding_window": 131072}, {"add_bias_linear": False}),
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096},
            {"add_qkv_bias": True},
        ),
        ({"attention_bias": True, "mlp_bias": True}, {"add_bias_linear": True}),
        (
            # What its config.json leaves out has transformers' defaults, not those of other families.
            {"model_type": "gemma2", "hidden_act": "absent", "attn_logit_softcapping": None},
            {
                "kv_channels": 256,
                "softmax_scale": 1 / 16,
                "embedding_multiplier": 64.0,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": 30.0,
                "window_size": (4095, 0),
                "window_attn_skip_freq": [1, 0] * 16,
                "post_layernorms": True,
                "layernorm_zero_centered_gamma": True,
            },
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
            {
                "num_moe_experts": 8,
                "moe_router_topk": 2,
                "moe_ffn_hidden_size": 14336,
                "moe_aux_loss_coeff": 0.02,
                "num_query_groups": 8,
            },
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            {
                "num_moe_experts": 128,
                "moe_ffn_hidden_size": 768,
                "moe_aux_loss_coeff": 0.001,
                "moe_router_pre_softmax": True,
                "qk_layernorm": True,
            },
        ),
        ({"model_type": "mistral"}, {"window_size": (4095, 0), "window_attn_skip_freq": None}),
        ({"model_type": "phi3", "sliding_window": 2047}, {"window_size": (2046, 0), "window_attn_skip_freq": None}),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 30},
            {"window_size": (511, 0), "window_attn_skip_freq": [0] * 30 + [1] * 2},
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 512,
                "layer_types": ["sliding_attention", "full_attention"] * 16,
            },
            {"window_size": (511, 0), "window_attn_skip_freq": [1, 0] * 16},
        ),
    ],
)
def test_each_family_says_what_it_adds(tmp_path: Path, changes: dict, expected: dict) -> None:
    transformer = describe(tmp_path, **changes).transformer
    assert {key: transformer[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation: found 'gelu'"),
        ({"model_type": "gemma2", "attention_bias": True}, "attention_bias: found True"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1}, "final_logit_softcapping: found -1"),
        ({"model_type": "qwen2_moe"}, "experts that every token passes"),
        ({"model_type": "mixtral"}, "num_local_experts: found None"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok: found 3"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "dense layers among MoE layers"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "dense layers among MoE layers"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}, "width of an expert: found None"),
        ({"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}, "'unheard_of'"),
        ({"model_type": "absent"}, "model_type: found None"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window: found '4096'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 0}, "sliding_window: found 0"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 32}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32}, "sliding_window: found None"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"attention_bias": True}, "mlp_bias False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {**LLAMA3_SCALING, "original_max_position_embeddings": 4096}}, "4096"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 2.0}}, "high_freq_factor"),
        ({"rope_scaling": {**LLAMA3_SCALING, "factor": "8"}}, "factor: found '8'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"hidden_size": -1}, "hidden_size: found -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers: found True"),
        ({"intermediate_size": "absent"}, "intermediate_size: found None"),
        ({"rms_norm_eps": "absent"}, "rms_norm_eps: found None"),
    ],
)
def test_what_cannot_be_computed_alike_is_refused_by_name(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe(tmp_path, **changes)
    assert named in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "found invalid JSON"),
        ("[]", "JSON list"),
        ("[" * 100_000, "found invalid JSON"),
        ("\xff", "found invalid JSON"),
    ],
)
def test_a_config_that_is_not_an_object_is_refused(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=named):
        describe_hf_model(tmp_path)


def test_a_missing_or_enormous_config_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no such file"):
        describe_hf_model(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="expected at most"):
        describe_hf_model(tmp_path)


@pytest.mark.parametrize(
    ("vocab_size", "ranks", "expected"),
    [
        (128256, 8, 129024),
        (151936, 8, 152576),
        (32000, 8, 32768),
        (256000, 8, 256000),
        (1003, 1, 1024),
        (128, 1, 128),
    ],
)
def test_the_vocabulary_is_padded_as_megatron_pads_it(vocab_size: int, ranks: int, expected: int) -> None:
    assert padded_vocab_size(vocab_size, ranks) == expected
