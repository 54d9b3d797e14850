"""Seed-OSS: biases of query, key and value, and of the attention's output where its config.json says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.mcore.family import Family, refuse, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REFUSALS = {"mlp_bias": (lambda bias: not bias, "no model of this family has one, and none was compared")}


def _options(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS)
    output = {"attention_output_bias": True} if config.attention_out_bias else {}
    return {"add_qkv_bias": bool(config.attention_bias), **output, **same_window_everywhere(config, None)}


FAMILIES = (
    Family(
        model_type="seed_oss",
        options=_options,
        examples=("ByteDance-Seed/Seed-OSS-36B-Instruct",),
        tests={"seed_oss": {"head_dim": 12}, "seed_oss_output_bias": {"head_dim": 8, "attention_out_bias": True}},
    ),
)
