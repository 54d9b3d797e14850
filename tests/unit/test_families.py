"""Each family's config.json becomes megatron's arguments; what it computes differently is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simpo_megatron.errors import CheckpointError, ConfigError
from simpo_megatron.mcore.attention.rotary import concentration, scaled_frequencies
from simpo_megatron.mcore.families import (
    FAMILIES,
    describe_hf_config,
    describe_hf_model,
    padded_vocab_size,
    stated_sizes,
)
from simpo_megatron.mcore.family import TINY_MODEL
from simpo_megatron.mcore.hf import MAX_JSON_BYTES

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
    assert four.gpt == five.gpt and four.rope == five.rope
    assert four.gpt["rotary_base"] == 500000.0
    found = [scaled_frequencies(each.hf_config, 4096).inverse for each in (four, five)]
    assert torch.equal(*found)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_a_model_cards_block_beside_rope_parameters_counts_as_transformers_reads_it(tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    description = describe(tmp_path, rope_parameters=plain, rope_scaling=YARN)
    found = scaled_frequencies(description.hf_config, 4096)
    assert description.rope["rope_type"] == "yarn" and description.rope["rope_theta"] == 1e4
    # The fastest elements turn as before, the slowest a fourth as fast; arXiv 2309.00071, section 3.2 and 3.4.
    before = 1 / 1e4 ** (torch.arange(0, 128, 2) / 128)
    assert torch.allclose(found.inverse[[0, -1]], before[[0, -1]] / torch.tensor([1.0, 4.0]))
    assert found.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_linear_rope_turns_all_elements_by_a_part(tmp_path: Path) -> None:
    scaled = describe(tmp_path, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}).hf_config
    assert torch.allclose(scaled_frequencies(scaled, 99).inverse * 4, 1 / 1e4 ** (torch.arange(0, 128, 2) / 128))


@pytest.mark.parametrize(("max_length", "factor"), [(4096, 1.5), (4097, 3.0)])
def test_longrope_takes_the_frequencies_of_the_longest_sequence_of_a_run(tmp_path: Path, max_length, factor) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 64, "long_factor": [3.0] * 64}
    found = describe(tmp_path, model_type="phi3", rope_parameters=rope, original_max_position_embeddings=4096)
    inverse = scaled_frequencies(found.hf_config, max_length).inverse
    assert torch.allclose(inverse * factor, 1 / 1e4 ** (torch.arange(0, 128, 2) / 128))


MODELS = [(family, name) for family in FAMILIES.values() for name in family.tests]


@pytest.mark.parametrize(("family", "name"), MODELS, ids=[name for _, name in MODELS])
def test_sizes_that_a_config_json_states_are_those_of_its_description(family, name) -> None:
    from transformers import CONFIG_MAPPING

    keys = {**TINY_MODEL, **family.tests[name], "model_type": family.model_type}
    written = json.loads(CONFIG_MAPPING[family.model_type].from_dict(keys).to_json_string())
    found, described = stated_sizes(written), describe_hf_config(written, name)
    assert found.pop("max_position_embeddings") == described.gpt["max_sequence_length"]
    assert {"num_layers", "num_attention_heads", "num_query_groups", "hidden_size", "ffn_hidden_size"} <= found.keys()
    assert found == {key: described.transformer[key] for key in found}
    assert described.transformer.keys() - found.keys() <= {"activation_func", "kv_channels"}
    for key in ("num_key_value_heads", "num_hidden_layers", "max_position_embeddings", "intermediate_size"):
        assert stated_sizes({**written, key: None}) is None, f"without {key} transformers has to say it"


@pytest.mark.parametrize("factor", [1.0, 0.7, 1.1386, 2.5])
def test_megatron_multiplies_sine_and_cosine_by_the_factor(factor: float) -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config as found,
    )

    assert found(SimpleNamespace(**concentration(factor))) == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize(("family", "base"), [("mixtral", 1e6), ("smollm3", 2e6), ("ernie4_5", 5e5), ("llama", 1e4)])
def test_what_config_json_leaves_out_has_the_default_of_its_family(tmp_path: Path, family: str, base: float) -> None:
    assert describe(tmp_path, model_type=family).gpt["rotary_base"] == base


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
        # No key of this family, so transformers builds an MLP without.
        ({"model_type": "qwen3", "mlp_bias": True, "attention_bias": True}, {"add_bias_linear": False}),
        ({"model_type": "qwen3", "head_dim": 128}, {"qk_layernorm": True, "kv_channels": 128}),
        ({"model_type": "mistral", "sliding_window": None, "head_dim": 64}, {"kv_channels": 64}),
        ({"model_type": "mistral", "sliding_window": 131072}, {"add_bias_linear": False}),
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096},
            {"add_qkv_bias": True},
        ),
        ({"attention_bias": True, "mlp_bias": True}, {"add_bias_linear": True}),
        (
            {"attention_bias": True},
            {"add_bias_linear": False, "add_qkv_bias": True, "attention_output_bias": True},
        ),
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
        ({"model_type": "gemma2", "final_logit_softcapping": -1.0}, "final_logit_softcapping: found -1.0"),
        ({"model_type": "cohere"}, "'cohere'"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found 50.0"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}},
            "rope_type of sliding_attention: found 'yarn', expected default",
        ),
        ({"model_type": "deepseek_v3"}, "num_key_value_heads: found 8, expected num_attention_heads 32"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "scoring_func: found 'softmax'"),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 32, "n_group": 3}, "n_group: found 3"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method: found 'noaux_tc'"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob: found True"),
        ({"model_type": "kimi_k2"}, "'kimi_k2', expected deepseek_v3, whose architecture it has"),
        ({"model_type": "gemma3", "text_config": {}}, "'gemma3', a model of more than text, expected its text"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "use_bias: found True"),
        ({"model_type": "gpt_oss", "attention_bias": False}, "attention_bias: found False"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "Mxfp4Config(dequantize=True)"),
        ({"is_causal": False}, "is_causal: found False"),
        ({"is_causal": None}, "is_causal: found None"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok: found 3"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 40}, "without a layer of experts"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 0}, "width of an expert: found 0"),
        ({"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}, "'unheard_of'"),
        ({"model_type": "absent"}, "model_type: found None"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "'sliding_window' expected"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 0}, "sliding_window: found 0"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 32}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32}, "sliding_window: found None"),
        ({"mlp_bias": True}, "attention_bias False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic', whose frequencies change"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "'proportional'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [1.0] * 2}},
            "expected those of longrope",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3_SCALING, "factor": "8"}}, "factor: found '8'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' expected int"),
        ({"intermediate_size": -1}, "intermediate_size: found -1"),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps: found 2.0"),
        ({"pad_token_id": 128256}, "pad_token_id: found 128256, expected null or an id below the vocab_size 128256"),
    ],
)
def test_what_cannot_be_computed_alike_is_refused_by_name(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe(tmp_path, **changes)
    assert named in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("pad", "row"), [(None, None), (0, 0), (128_255, 128_255), (-1, 128_255)])
def test_the_row_of_padding_is_that_of_transformers(tmp_path: Path, pad: int | None, row: int | None) -> None:
    assert describe(tmp_path, pad_token_id=pad).padding_idx == row


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
    with pytest.raises(CheckpointError, match="bytes, more than"):
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


def test_every_family_has_models_that_prove_it() -> None:
    names = [name for family in FAMILIES.values() for name in family.tests]
    assert len(names) == len(set(names))
    assert all(family.tests and family.examples for family in FAMILIES.values())
