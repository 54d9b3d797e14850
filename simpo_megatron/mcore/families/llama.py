"""Llama 2 and 3, and models with their architecture."""

from __future__ import annotations

from simpo_megatron.mcore.family import Family, attention_and_mlp_biases, same_window_everywhere

_ROPE_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

FAMILIES = (
    Family(
        model_type="llama",
        options=lambda config: {**attention_and_mlp_biases(config), **same_window_everywhere(config, None)},
        examples=("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-2-7b-hf", "HuggingFaceTB/SmolLM2-135M"),
        tests={
            "llama2_without_groups": {"num_key_value_heads": 8},
            "llama31_scaled_rope": {"rope_parameters": _ROPE_3},
            "llama32_tied": {"rope_parameters": {**_ROPE_3, "factor": 32.0}, "tie_word_embeddings": True},
            "llama_other_scaled_rope": {
                "rope_parameters": {
                    **_ROPE_3,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 8.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "llama_biases_linear_rope": {
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            },
            "llama_biases_of_attention": {"attention_bias": True},
        },
    ),
)
