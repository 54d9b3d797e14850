"""ERNIE 4.5, dense: its heads turn in neighbouring pairs, and it has biases in all layers or in none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpo_megatron.mcore.family import Family, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _options(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "add_bias_linear": bool(config.use_bias),
        "rotary_interleaved": True,
        **same_window_everywhere(config, None),
    }


FAMILIES = (
    Family(
        model_type="ernie4_5",
        options=_options,
        examples=("baidu/ERNIE-4.5-0.3B-PT",),
        tests={"ernie4_5": {"head_dim": 16}, "ernie4_5_biases": {"head_dim": 8, "use_bias": True}},
    ),
)
