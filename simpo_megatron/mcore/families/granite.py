"""Granite 3, dense: constants multiply the embedding, the attention scores, the residual branches and the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.mcore.family import Family, attention_and_mlp_biases, number, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _options(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": number(config, "embedding_multiplier"),
        "softmax_scale": number(config, "attention_multiplier"),
        "residual_multiplier": number(config, "residual_multiplier"),
        "logits_scaling": number(config, "logits_scaling"),
        **attention_and_mlp_biases(config),
        **same_window_everywhere(config, None),
    }


FAMILIES = (
    Family(
        model_type="granite",
        options=_options,
        examples=("ibm-granite/granite-3.3-8b-instruct", "ibm-granite/granite-3.3-2b-instruct"),
        tests={
            "granite": {
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.25,
                "residual_multiplier": 0.22,
                "logits_scaling": 1.5,
                "tie_word_embeddings": True,
            },
            "granite_biases": {
                "attention_bias": True,
                "mlp_bias": True,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.35,
            },
        },
    ),
)
