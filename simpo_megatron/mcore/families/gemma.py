"""Gemma 1, 2 and 3: norms with weights around zero, a scaled embedding, a gelu.

The second has soft caps and windows, the third windows whose layers have a rotary embedding of their own.
"""

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
from simpo_megatron.mcore.hf import WINDOWED, windowed_rope_parameters

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


_GEMMA3_REFUSALS = {
    "attn_logit_softcapping": (lambda cap: cap is None, "transformers does not apply it in this family"),
}


def _gemma3(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _GEMMA3_REFUSALS)
    # transformers halves the window of models that look ahead, which are refused.
    return {
        **_shared(config),
        "activation_func": activation(config, "hidden_activation"),
        "softmax_scale": number(config, "query_pre_attn_scalar") ** -0.5,
        "qk_layernorm": True,
        "post_layernorms": True,
        "final_logit_softcapping": _soft_cap(config, "final_logit_softcapping"),
        **sliding_window(config, config.sliding_window, config.layer_types),
        **_windowed_rotary(config),
    }


def _windowed_rotary(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary embedding of the layers with a window.

    Raises:
        ConfigError: its frequencies are scaled.
    """
    rope = windowed_rope_parameters(config)
    if rope["rope_type"] != "default":
        raise ConfigError(
            f"rope_type of {WINDOWED}: found {rope['rope_type']!r}, expected default: no model scales the frequencies "
            "of layers with a window, and none was compared"
        )
    base = rope["rope_theta"]
    if isinstance(base, bool) or not isinstance(base, int | float) or not base >= 1:
        raise ConfigError(f"rope_theta of {WINDOWED}: found {base!r}, expected a number of at least 1")
    return {
        "windowed_rotary_base": float(base),
        "windowed_rotary_freq": [int(kind == WINDOWED) for kind in config.layer_types],
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
    Family(
        model_type="gemma3_text",
        options=_gemma3,
        names=WeightNames(pre_mlp_norm="pre_feedforward_layernorm"),
        examples=("google/gemma-3-1b-it", "google/gemma-3-270m-it"),
        tests={
            "gemma3": {
                "head_dim": 16,
                "query_pre_attn_scalar": 20,
                "sliding_window": 8,
                "sliding_window_pattern": 2,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            # A window wider than any sequence, whose layers turn as their kind does, without the others' factor.
            "gemma3_wide_window": {
                "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
                "head_dim": 12,
                "sliding_window": 256,
                "sliding_window_pattern": 3,
                "rope_local_base_freq": 500.0,
                "final_logit_softcapping": 2.0,
                "tie_word_embeddings": False,
            },
        },
    ),
)
