"""Arcee's AFM: an MLP without gate, of squared ReLUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.mcore.family import Family, WeightNames, attention_and_mlp_biases, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _options(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "gated_linear_unit": False,
        **attention_and_mlp_biases(config),
        **same_window_everywhere(config, None),
    }


FAMILIES = (
    Family(
        model_type="arcee",
        options=_options,
        names=WeightNames(gate_up=("mlp.up_proj",)),
        examples=("arcee-ai/AFM-4.5B",),
        tests={
            "arcee": {},
            "arcee_biases_yarn": {
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 20.0,
                    "beta_fast": 16.0,
                    "mscale": 1.0,
                    "original_max_position_embeddings": 32,
                },
            },
        },
    ),
)
