"""ERNIE 4.5, dense and as MoE: interleaved rotary embedding; biases in all layers or in none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REFUSALS = {"use_bias": (lambda bias: not bias, "its experts have none, while megatron-core's then have")}


def _dense(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "add_bias_linear": bool(config.use_bias),
        "rotary_interleaved": True,
        **same_window_everywhere(config, None),
    }


def _moe(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS)
    num_shared = count(config, "moe_num_shared_experts", least=0)
    width = count(config, "moe_intermediate_size")
    return {
        **_dense(config),
        **experts(config, config.moe_num_experts, width),
        **_moe_layers(config),
        "router_in_fp32": True,
        "expert_choice": ExpertChoice(
            num_chosen=count(config, "moe_k"),
            has_bias=True,
            divides_by_sum=True,
            least_sum=number(config, "moe_norm_min"),
        ),
        **({"moe_shared_expert_intermediate_size": num_shared * width} if num_shared else {}),
    }


def _moe_layers(config: PretrainedConfig) -> dict[str, Any]:
    step = count(config, "moe_layer_interval")
    first = require_count("moe_layer_start_index", config.moe_layer_start_index, least=0)
    last = require_count("moe_layer_end_index", config.moe_layer_end_index, least=-1)
    if last == -1:
        last = config.num_hidden_layers - 1
    return dense_layers(config, lambda layer: first <= layer <= last and (layer + 1) % step == 0)


_MIXTURE = {"head_dim": 16, "moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 24, "use_bias": False}

FAMILIES = (
    Family(
        model_type="ernie4_5",
        options=_dense,
        examples=("baidu/ERNIE-4.5-0.3B-PT",),
        tests={"ernie4_5": {"head_dim": 16}, "ernie4_5_biases": {"head_dim": 8, "use_bias": True}},
    ),
    Family(
        model_type="ernie4_5_moe",
        options=_moe,
        names=WeightNames(
            router_bias="mlp.moe_statics.e_score_correction_bias",
            router_bias_is_row=True,
            shared_expert="mlp.shared_experts.",
        ),
        examples=("baidu/ERNIE-4.5-21B-A3B-PT",),
        tests={
            "ernie4_5_moe": {**_MIXTURE, "moe_num_shared_experts": 2},
            "ernie4_5_moe_sparse": {
                **_MIXTURE,
                "moe_num_shared_experts": 0,
                "moe_layer_start_index": 0,
                "moe_layer_end_index": 2,
                "moe_layer_interval": 2,
            },
        },
    ),
)
