"""Qwen2, Qwen2.5 and Qwen3, dense and as MoE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.mcore.family import (
    Family,
    attention_biases,
    count,
    dense_layers,
    experts,
    require_count,
    same_window_everywhere,
    sliding_window,
)
from simpo_megatron.mcore.hf import FULL

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _window(config: PretrainedConfig) -> dict[str, Any]:
    """Qwen has a window only where `use_sliding_window` says so, from layer `max_window_layers` on."""
    kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    return sliding_window(config, config.sliding_window, kinds)


def _mixture(config: PretrainedConfig) -> dict[str, Any]:
    step, dense = require_count("decoder_sparse_step", config.decoder_sparse_step), set(config.mlp_only_layers or ())
    return {
        **experts(config, config.num_experts, config.moe_intermediate_size),
        # The softmax over all experts, or only over the chosen ones.
        "moe_router_pre_softmax": not config.norm_topk_prob,
        **dense_layers(config, lambda layer: layer not in dense and (layer + 1) % step == 0),
    }


def _qwen3_moe(config: PretrainedConfig) -> dict[str, Any]:
    window = config.sliding_window if config.use_sliding_window else None
    return {
        "qk_layernorm": True,
        **attention_biases(config),
        **_mixture(config),
        **same_window_everywhere(config, window),
    }


def _qwen2_moe(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "add_qkv_bias": bool(config.qkv_bias),
        **_mixture(config),
        # An expert that every token passes, weighed by a gate of its own.
        "moe_shared_expert_intermediate_size": count(config, "shared_expert_intermediate_size"),
        "moe_shared_expert_gate": True,
        **_window(config),
    }


_MIXTURE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

FAMILIES = (
    Family(
        model_type="qwen2",
        options=lambda config: {"add_qkv_bias": True, **_window(config)},
        examples=("Qwen/Qwen2.5-72B-Instruct", "Qwen/Qwen2.5-7B-Instruct-1M"),
        tests={
            "qwen2_tied_windows_above": {
                "tie_word_embeddings": True,
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 3,
            },
            "qwen2_yarn": {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        },
    ),
    Family(
        model_type="qwen3",
        options=lambda config: {"qk_layernorm": True, **attention_biases(config), **_window(config)},
        examples=("Qwen/Qwen3-8B", "Qwen/Qwen3-4B-Instruct-2507"),
        tests={"qwen3": {"head_dim": 16}, "qwen3_biases_of_attention": {"head_dim": 12, "attention_bias": True}},
    ),
    Family(
        model_type="qwen2_moe",
        options=_qwen2_moe,
        examples=("Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"),
        tests={
            "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 56},
            "qwen2_moe_dense_layers": {
                **_MIXTURE,
                "shared_expert_intermediate_size": 24,
                "decoder_sparse_step": 2,
                "norm_topk_prob": True,
                "qkv_bias": False,
            },
        },
    ),
    Family(
        model_type="qwen3_moe",
        options=_qwen3_moe,
        examples=("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"),
        tests={
            "qwen3_moe": {
                **_MIXTURE,
                "num_experts_per_tok": 3,
                "norm_topk_prob": True,
                "tie_word_embeddings": True,
            },
            "qwen3_moe_softmax_over_all": {**_MIXTURE, "norm_topk_prob": False},
            "qwen3_moe_dense_layers": {**_MIXTURE, "mlp_only_layers": [0], "norm_topk_prob": True},
        },
    ),
)
