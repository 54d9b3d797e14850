"""GLM-4.5 and 4.6: dense layers first, then experts chosen by sigmoids with a bias, and shared experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.family import (
    Family,
    WeightNames,
    count,
    dense_layers,
    experts,
    number,
    refuse,
    require_count,
    same_window_everywhere,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REFUSALS = {
    "norm_topk_prob": (bool, "megatron-core divides the sigmoids of the chosen experts by their sum"),
    "output_router_logits": (lambda wanted: not wanted, "transformers has no load-balancing loss for this family"),
}


def _options(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS)
    first_dense = require_count("first_k_dense_replace", config.first_k_dense_replace, least=0)
    return {
        "add_qkv_bias": bool(config.attention_bias),
        "qk_layernorm": bool(config.use_qk_norm),
        **experts(config, config.n_routed_experts, config.moe_intermediate_size),
        **dense_layers(config, lambda layer: layer >= first_dense),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        # The bias stays as it was trained.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": number(config, "routed_scaling_factor"),
        "moe_shared_expert_intermediate_size": config.moe_intermediate_size * count(config, "n_shared_experts"),
        **_expert_groups(config),
        **same_window_everywhere(config, None),
    }


def _expert_groups(config: PretrainedConfig) -> dict[str, Any]:
    """Options that choose experts from the `topk_group` groups with the largest sum of their two best scores.

    Raises:
        ConfigError: megatron-core would add up another number of a group's best.
    """
    num_groups, num_chosen = count(config, "n_group"), count(config, "topk_group")
    if num_groups == 1 or num_groups == num_chosen:
        return {}
    if config.num_experts_per_tok // num_chosen != 2:
        raise ConfigError(
            f"topk_group: found {num_chosen} with num_experts_per_tok {config.num_experts_per_tok}, expected half of "
            "it: megatron-core ranks a group by as many experts as it gives on average, transformers by two"
        )
    return {"moe_router_num_groups": num_groups, "moe_router_group_topk": num_chosen}


_MIXTURE = {
    "head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
}

FAMILIES = (
    Family(
        model_type="glm4_moe",
        options=_options,
        turns_in_part=True,
        names=WeightNames(shared_expert="mlp.shared_experts."),
        examples=("zai-org/GLM-4.5-Air", "zai-org/GLM-4.6"),
        tests={
            "glm4_moe": {**_MIXTURE, "first_k_dense_replace": 1, "attention_bias": True},
            "glm4_moe_groups": {
                **_MIXTURE,
                "first_k_dense_replace": 0,
                "n_group": 4,
                "topk_group": 2,
                "use_qk_norm": True,
            },
        },
    ),
)
