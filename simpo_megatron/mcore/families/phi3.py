"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini, whose query, key and value, and gate and up, are one tensor each."""

from __future__ import annotations

from simpo_megatron.mcore.family import Family, WeightNames, same_window_everywhere

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [1.0, 2.5, 9.0],
}

FAMILIES = (
    Family(
        model_type="phi3",
        turns_in_part=True,
        options=lambda config: same_window_everywhere(config, config.sliding_window),
        names=WeightNames(query_key_value=("self_attn.qkv_proj",) * 3, gate_up=("mlp.gate_up_proj",) * 2),
        examples=("microsoft/Phi-3.5-mini-instruct", "microsoft/Phi-4-mini-instruct", "microsoft/phi-4"),
        tests={
            "phi3": {},
            "phi3_partial_rope": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            },
            # Sequences of 38 tokens are short to the one and long to the other.
            "phi3_partial_longrope": {"original_max_position_embeddings": 64, "rope_parameters": _LONGROPE},
            "phi3_longrope_long": {"original_max_position_embeddings": 16, "rope_parameters": _LONGROPE},
        },
    ),
)
