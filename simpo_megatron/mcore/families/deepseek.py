"""DeepSeek V2 and V3, and Moonlight: latent attention; dense layers first, then experts, some of them for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.expert_choice import ExpertChoice
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
from simpo_megatron.mcore.hf import rope_parameters
from simpo_megatron.mcore.latent_sizes import LatentSizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REFUSALS = {
    "attention_bias": (lambda bias: not bias, "no model of this family has one, and none was compared"),
    "mlp_bias": (lambda bias: not bias, "no model of this family has one, and none was compared"),
    "moe_layer_freq": (lambda freq: freq in (None, 1), "transformers has experts in every layer after the dense ones"),
}
_REFUSALS_V2 = {
    "topk_method": (
        lambda method: method in ("greedy", "group_limited_greedy"),
        "expected greedy or group_limited_greedy, which transformers has",
    ),
    "norm_topk_prob": (lambda norm: not norm, "transformers does not divide the weights of this family by their sum"),
    "scoring_func": (lambda scores: scores in (None, "softmax"), "transformers takes a softmax in this family"),
}
_REFUSALS_V3 = {
    "topk_method": (lambda method: method in (None, "noaux_tc"), "transformers ranks groups by their two best experts"),
    "scoring_func": (lambda scores: scores in (None, "sigmoid"), "transformers takes sigmoids in this family"),
}


def _shared(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS)
    num_heads, num_keys = count(config, "num_attention_heads"), count(config, "num_key_value_heads")
    if num_heads != num_keys:
        raise ConfigError(f"num_key_value_heads: found {num_keys}, expected num_attention_heads {num_heads}")
    sizes = LatentSizes(
        q_lora_rank=None if config.q_lora_rank is None else count(config, "q_lora_rank"),
        kv_lora_rank=count(config, "kv_lora_rank"),
        qk_head_dim=count(config, "qk_nope_head_dim"),
        qk_pos_emb_head_dim=count(config, "qk_rope_head_dim"),
        v_head_dim=count(config, "v_head_dim"),
    )
    if sizes.v_head_dim > sizes.query_size:
        raise ConfigError(
            f"v_head_dim: found {sizes.v_head_dim}, expected at most the size of a key {sizes.query_size}"
        )
    first_dense = require_count("first_k_dense_replace", config.first_k_dense_replace, least=0)
    return {
        "latent": sizes,
        "kv_channels": sizes.v_head_dim,
        "softmax_scale": _scale(rope_parameters(config)) * sizes.query_size**-0.5,
        **experts(config, config.n_routed_experts, config.moe_intermediate_size),
        **dense_layers(config, lambda layer: layer >= first_dense),
        "moe_shared_expert_intermediate_size": config.moe_intermediate_size * count(config, "n_shared_experts"),
        **same_window_everywhere(config, None),
    }


def _scale(rope: Mapping[str, Any]) -> float:
    """The factor of attention scores that goes with a scaled rotary embedding.

    Source: transformers.models.deepseek_v3.modeling_deepseek_v3.yarn_apply_mscale.
    """
    mscale, factor = rope.get("mscale_all_dim"), rope.get("factor", 1)
    if rope["rope_type"] == "default" or not mscale or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


def _groups(config: PretrainedConfig, num_best: int) -> dict[str, Any]:
    """Options of ExpertChoice by which experts come from the best `topk_group` of `n_group` groups.

    Raises:
        ConfigError: experts cannot be divided so, or the chosen groups have too few.
    """
    num_experts, num_groups, num_chosen = config.n_routed_experts, count(config, "n_group"), count(config, "topk_group")
    if num_experts % num_groups or num_experts // num_groups < num_best or num_chosen > num_groups:
        raise ConfigError(
            f"n_group: found {num_groups} with topk_group {num_chosen} and {num_experts} experts, expected groups of "
            f"one size, {num_best} experts at least in each"
        )
    if num_experts // num_groups * num_chosen < config.num_experts_per_tok:
        raise ConfigError(
            f"topk_group: found {num_chosen} groups of {num_experts // num_groups} experts, expected as many as hold "
            f"the {config.num_experts_per_tok} of a token"
        )
    return {"num_groups": num_groups, "num_chosen_groups": num_chosen, "num_best": num_best}


def _v2(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS_V2)
    shared = _shared(config)
    choice = ExpertChoice(
        num_chosen=config.num_experts_per_tok,
        scale=number(config, "routed_scaling_factor"),
        **(_groups(config, 1) if config.topk_method == "group_limited_greedy" else {}),
    )
    return {**shared, "rotary_interleaved": True, "expert_choice": choice}


def _v3(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS_V3)
    shared = _shared(config)
    choice = ExpertChoice(
        num_chosen=config.num_experts_per_tok,
        scores="sigmoid",
        has_bias=True,
        divides_by_sum=bool(config.norm_topk_prob),
        scale=number(config, "routed_scaling_factor"),
        **_groups(config, 2),
    )
    return {**shared, "rotary_interleaved": bool(config.rope_interleave), "expert_choice": choice}


_SIZES = {
    "num_key_value_heads": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
_NAMES = WeightNames(shared_expert="mlp.shared_experts.")

FAMILIES = (
    Family(
        model_type="deepseek_v2",
        options=_v2,
        names=_NAMES,
        examples=("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V2-Chat"),
        tests={
            "deepseek_v2": {
                **_SIZES,
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            },
            "deepseek_v2_lite": {**_SIZES, "q_lora_rank": None, "first_k_dense_replace": 0},
        },
    ),
    Family(
        model_type="deepseek_v3",
        options=_v3,
        names=_NAMES,
        examples=("moonshotai/Moonlight-16B-A3B-Instruct", "deepseek-ai/DeepSeek-V3"),
        tests={
            "deepseek_v3": {
                **_SIZES,
                "n_group": 4,
                "topk_group": 2,
                "norm_topk_prob": True,
                "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
            },
            # As Moonlight, whose norms have another epsilon than those of its latents.
            "deepseek_v3_moonlight": {
                **_SIZES,
                "q_lora_rank": None,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "rms_norm_eps": 1e-3,
                "rope_interleave": False,
            },
        },
    ),
)
