"""gpt-oss: attention sinks, a sliding window in every second layer, experts with biases and a clamped gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpo_megatron.mcore.family import Family, WeightNames, experts, number, refuse, sliding_window

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

_REFUSALS = {
    "attention_bias": (bool, "its experts have biases, and megatron-core then has them in all linear layers"),
}


def _options(config: PretrainedConfig) -> dict[str, Any]:
    refuse(config, _REFUSALS)
    return {
        "add_bias_linear": True,
        "softmax_type": "learnable",
        # transformers' constants, before it had keys for them.
        "activation_func": Swish(number(config, "swiglu_alpha") if hasattr(config, "swiglu_alpha") else 1.702),
        "activation_func_clamp_value": number(config, "swiglu_limit") if hasattr(config, "swiglu_limit") else 7.0,
        "glu_linear_offset": 1.0,
        **experts(config, config.num_local_experts, config.intermediate_size),
        **sliding_window(config, config.sliding_window, config.layer_types),
    }


@dataclass(frozen=True)
class Swish:
    """The function x * sigmoid(alpha * x); its text, which a checkpoint keeps, is the same in every process."""

    alpha: float

    def __call__(self, inputs: Tensor) -> Tensor:
        """The function of each element."""
        return inputs * (self.alpha * inputs).sigmoid()


_MIXTURE = {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24}

FAMILIES = (
    Family(
        model_type="gpt_oss",
        options=_options,
        names=WeightNames(router="mlp.router", stacked_experts=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
        examples=("openai/gpt-oss-20b", "openai/gpt-oss-120b"),
        # Limits at which gates of this size bend.
        tests={
            "gpt_oss": {
                **_MIXTURE,
                "sliding_window": 8,
                "swiglu_limit": 0.5,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1.5e5,
                    "factor": 8.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 32,
                },
            },
            "gpt_oss_full_attention": {
                **_MIXTURE,
                "layer_types": ["full_attention"] * 4,
                "swiglu_alpha": 1.2,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
)
