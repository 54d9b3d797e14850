"""GLM-4 of 2024 and 2025: interleaved rotary embedding of half of each head; the second has post-norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.mcore.family import Family, WeightNames, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_GATE_UP = ("mlp.gate_up_proj",) * 2


def _shared(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "add_qkv_bias": bool(config.attention_bias),
        "rotary_interleaved": True,
        **same_window_everywhere(config, None),
    }


FAMILIES = (
    Family(
        model_type="glm",
        turns_in_part=True,
        options=_shared,
        names=WeightNames(gate_up=_GATE_UP),
        examples=("zai-org/glm-4-9b-chat-hf",),
        tests={"glm": {"head_dim": 16}, "glm_without_biases": {"head_dim": 8, "attention_bias": False}},
    ),
    Family(
        model_type="glm4",
        turns_in_part=True,
        options=lambda config: {**_shared(config), "post_layernorms": True},
        names=WeightNames(
            gate_up=_GATE_UP,
            post_attention_norm="post_self_attn_layernorm",
            pre_mlp_norm="post_attention_layernorm",
            post_mlp_norm="post_mlp_layernorm",
        ),
        examples=("zai-org/GLM-4-9B-0414", "zai-org/GLM-4-32B-0414"),
        tests={"glm4": {"head_dim": 16}},
    ),
)
