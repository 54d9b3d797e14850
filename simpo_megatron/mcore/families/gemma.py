"""Gemma 1 and 2: norms with weights around zero, a scaled embedding, a gelu; the second with soft caps and windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.family import (
    Family,
    WeightNames,
    activation,
    count,
    number,
    refuse,
    same_window_everywhere,
    sliding_window,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REFUSALS = {
    "attention_bias": (lambda bias: not bias, "no model of this family has one, and none was compared"),
    "use_bidirectional_attention": (lambda wanted: not wanted, "a language model attends to the left only"),
}


def _shared(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS)
    return {
        "layernorm_zero_centered_gamma": True,
        "embedding_multiplier": config.hidden_size**0.5,
    }


def _gemma(config: PretrainedConfig) -> dict[str, Any]:
    # transformers 4 keeps the activation under another name, and `hidden_act` of old files means nothing there.
    key = "hidden_activation" if getattr(config, "hidden_activation", None) else "hidden_act"
    return {
        **_shared(config),
        "activation_func": activation(config, key),
        **same_window_everywhere(config, None),
    }


def _gemma2(config: PretrainedConfig) -> dict[str, Any]:
    return {
        **_shared(config),
        "activation_func": activation(config, "hidden_activation"),
        "softmax_scale": count(config, "query_pre_attn_scalar") ** -0.5,
        "post_layernorms": True,
        "attn_logit_softcapping": _soft_cap(config, "attn_logit_softcapping"),
        "final_logit_softcapping": _soft_cap(config, "final_logit_softcapping"),
        **sliding_window(config, config.sliding_window, config.layer_types),
    }


def _soft_cap(config: PretrainedConfig, key: str) -> float | None:
    if getattr(config, key) is None:
        return None
    try:
        number(config, key)
    except ConfigError as error:
        raise ConfigError(f"{error}, or null for no cap") from None
    return getattr(config, key)


FAMILIES = (
    Family(
        model_type="gemma",
        options=_gemma,
        examples=("google/gemma-7b-it", "google/gemma-2b-it"),
        tests={"gemma": {"head_dim": 16}},
    ),
    Family(
        model_type="gemma2",
        options=_gemma2,
        names=WeightNames(pre_mlp_norm="pre_feedforward_layernorm"),
        examples=("google/gemma-2-9b-it", "google/gemma-2-27b-it"),
        # Caps at which scores and logits of this size bend.
        tests={
            "gemma2": {
                "head_dim": 16,
                "query_pre_attn_scalar": 12,
                "sliding_window": 8,
                "attn_logit_softcapping": 1.0,
                "final_logit_softcapping": 2.0,
            }
        },
    ),
)
