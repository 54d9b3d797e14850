"""Mistral 7B, Nemo and Small, dense, and the MoE models of Mixtral."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.mcore.family import Family, WeightNames, experts, refuse, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REFUSALS = {
    "router_jitter_noise": (lambda noise: not noise, "megatron-core adds noise to the router's input only"),
}


def _mixtral(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS)
    return {
        **experts(config, config.num_local_experts, config.intermediate_size),
        **same_window_everywhere(config, config.sliding_window),
    }


FAMILIES = (
    Family(
        model_type="mistral",
        options=lambda config: same_window_everywhere(config, config.sliding_window),
        examples=("mistralai/Mistral-7B-Instruct-v0.2", "mistralai/Mistral-Nemo-Instruct-2407"),
        tests={"mistral_wide_heads_window": {"head_dim": 16, "sliding_window": 8}},
    ),
    Family(
        model_type="mixtral",
        options=_mixtral,
        names=WeightNames(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}.",
            expert_matrices=("w1", "w3", "w2"),
        ),
        examples=("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        tests={"mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2}},
    ),
)
