"""SmolLM3: every fourth layer has no rotary embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.family import Family, attention_and_mlp_biases, sliding_window

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _options(config: PretrainedConfig) -> dict[str, Any]:
    turns = config.no_rope_layers
    if len(turns) != config.num_hidden_layers:
        raise ConfigError(f"no_rope_layers: found {turns!r}, expected 0 or 1 for each layer")
    return {
        # 1 stands for a layer that has a rotary embedding there, and for one that has none in megatron-core.
        "no_rope_freq": [int(not turns_here) for turns_here in turns],
        **attention_and_mlp_biases(config),
        **sliding_window(config, config.sliding_window, config.layer_types),
    }


FAMILIES = (
    Family(
        model_type="smollm3",
        options=_options,
        examples=("HuggingFaceTB/SmolLM3-3B",),
        tests={
            "smollm3": {"no_rope_layer_interval": 2},
            "smollm3_windows": {"use_sliding_window": True, "sliding_window": 9, "tie_word_embeddings": False},
        },
    ),
)
