"""The parts of a model family's file, and the options of megatron-core that families have in common.

All but the activations themselves is found without torch, so that a layout is checked before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.hf import FULL, MAX_COUNT, MAX_COUNTS, WINDOWED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

TINY_MODEL: Mapping[str, Any] = {
    "vocab_size": 259,  # prime: divides over no number of ranks
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The config.json of every model that proves a family, where the family does not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class WeightNames:
    """Names of a layer's weights in a folder, `model.layers.N.` before and `.weight` or `.bias` behind them.

    Where several names are one, the folder has one tensor, whose rows are theirs in turn. The defaults are Llama's.
    """

    query_key_value: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output: str = "self_attn.o_proj"
    sinks: str = "self_attn.sinks"
    """Whole."""
    post_attention_norm: str = "post_attention_layernorm"
    """The norm on what attention adds to the residual, where there is one."""
    pre_mlp_norm: str = "post_attention_layernorm"
    post_mlp_norm: str = "post_feedforward_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up; an MLP without gate has the second alone."""
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.e_score_correction_bias"
    """The whole name; no suffix is added."""
    router_bias_is_row: bool = False
    """True when the file has the bias as a matrix of one row."""
    expert: str = "mlp.experts.{}."
    """The part before the names of an expert's matrices, `{}` its number."""
    expert_matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked_experts: tuple[str, str] | None = None
    """Names of two tensors, gate and up, and down, that hold all experts; whole but for the `_bias` of biases."""
    shared_expert: str = "mlp.shared_expert."
    """The same of the expert that every token passes."""
    shared_expert_gate: str = "mlp.shared_expert_gate.weight"
    """Whole."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models: everything that tells it from Llama."""

    model_type: str
    """The `model_type` of config.json."""
    options: Callable[[PretrainedConfig], dict[str, Any]]
    """Options of megatron's TransformerConfig, beside `shared_options` or in their place.

    Raises ConfigError for what megatron-core would compute differently.
    """
    names: WeightNames = WeightNames()
    turns_in_part: bool = False
    """True when `partial_rotary_factor` applies: the rest of each head has no rotary embedding."""
    examples: tuple[str, ...]
    """Models of the family, by their names on the hub."""
    tests: Mapping[str, Mapping[str, Any]]
    """Models that prove the family, by name, as keys of config.json beside TINY_MODEL or in its place."""


def shared_options(config: PretrainedConfig) -> dict[str, Any]:
    """Options that all families share: pre-norm blocks of RMSNorm, grouped-query attention and a gated MLP.

    Raises:
        ConfigError: a size is no number, or the sizes do not fit together.
    """
    num_heads = count(config, "num_attention_heads")
    num_groups = count(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_groups:
        raise ConfigError(
            f"num_attention_heads: found {num_heads}, expected a multiple of num_key_value_heads {num_groups}"
        )
    hidden_size = count(config, "hidden_size")
    epsilon = getattr(config, "rms_norm_eps", None)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ConfigError(f"rms_norm_eps: found {epsilon!r}, expected a number between 0 and 1")
    return {
        "num_layers": count(config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": count(config, "intermediate_size"),
        "num_attention_heads": num_heads,
        "num_query_groups": num_groups,
        "kv_channels": count(config, "head_dim", default=hidden_size // num_heads),
        "normalization": "RMSNorm",
        "layernorm_epsilon": epsilon,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    }


def gelu_tanh(gate: Tensor) -> Tensor:
    """The gelu that transformers calls `gelu_pytorch_tanh`."""
    from torch.nn.functional import gelu

    return gelu(gate, approximate="tanh")


def squared_relu(inputs: Tensor) -> Tensor:
    """The square of a ReLU, which transformers calls `relu2`."""
    return inputs.relu().square()


_ACTIVATIONS = {"gelu_pytorch_tanh": gelu_tanh, "relu2": squared_relu}
_SILU = ("silu", "swish")


def activation(config: PretrainedConfig, key: str) -> Callable[[Tensor], Tensor]:
    """The activation that `key` of config.json names; silu where it names none.

    Raises:
        ConfigError: it is one that was not compared.
    """
    found = getattr(config, key, None)
    # Families whose key is another one leave this one out.
    if found in _SILU or (found is None and key == "hidden_act"):
        # megatron-core looks for this very function, to fuse it.
        from torch.nn.functional import silu

        return silu
    if not isinstance(found, str) or found not in _ACTIVATIONS:
        raise ConfigError(f"{key}: found {found!r}, expected one of {', '.join((*_SILU, *_ACTIVATIONS))}")
    return _ACTIVATIONS[found]


def attention_and_mlp_biases(config: PretrainedConfig) -> dict[str, Any]:
    """Biases of the four attention matrices by `attention_bias`, of the MLP's by `mlp_bias`.

    Raises:
        ConfigError: the MLP has some and attention has none.
    """
    in_attention, in_mlp = bool(getattr(config, "attention_bias", False)), bool(getattr(config, "mlp_bias", False))
    if in_attention and in_mlp:
        return {"add_bias_linear": True}
    if in_mlp:
        raise ConfigError(
            "mlp_bias: found True with attention_bias False, expected both or none: megatron-core's MLP has biases "
            "only where all linear layers have"
        )
    return attention_biases(config)


def attention_biases(config: PretrainedConfig) -> dict[str, Any]:
    """Biases of the four attention matrices by `attention_bias`, for families whose MLP has none."""
    if not getattr(config, "attention_bias", False):
        return {}
    return {"add_qkv_bias": True, "attention_output_bias": True}


def same_window_everywhere(config: PretrainedConfig, window: int | None) -> dict[str, Any]:
    """A sliding window in all layers, or none, for families whose model does not look at `layer_types`.

    Raises:
        ConfigError: `layer_types` says otherwise, or the window is no number.
    """
    kind = FULL if window is None else WINDOWED
    if set(getattr(config, "layer_types", None) or ()) - {kind}:
        raise ConfigError(f"layer_types: found {config.layer_types!r}, expected {kind} in every layer of this family")
    return sliding_window(config, window, [kind] * config.num_hidden_layers)


def sliding_window(config: PretrainedConfig, window: int | None, kinds: Sequence[str]) -> dict[str, Any]:
    """A token sees `window` tokens of its sequence, itself the last, in the layers whose kind says so.

    Source: transformers.masking_utils.sliding_window_overlay; megatron counts the tokens to the left only.

    Raises:
        ConfigError: kinds of attention that megatron-core does not have, or a window that is no number.
    """
    if len(kinds) != config.num_hidden_layers or set(kinds) - {FULL, WINDOWED}:
        raise ConfigError(f"layer_types: found {list(kinds)!r}, expected {FULL} or {WINDOWED} for each layer")
    windowed = [int(kind == WINDOWED) for kind in kinds]
    if not any(windowed):
        return {}
    num_seen = require_count("sliding_window", window)
    if num_seen >= count(config, "max_position_embeddings"):
        return {}
    return {"window_size": (num_seen - 1, 0), "window_attn_skip_freq": None if all(windowed) else windowed}


def experts(config: PretrainedConfig, num_experts: int, width: Any) -> dict[str, Any]:
    """An MoE of `num_experts` experts of `width`, of which a token passes `num_experts_per_tok`.

    Raises:
        ConfigError: sizes or weights that are no numbers, or more experts chosen than there are.
    """
    num_experts, num_chosen = require_count("num_experts", num_experts), count(config, "num_experts_per_tok")
    if num_chosen > num_experts:
        raise ConfigError(f"num_experts_per_tok: found {num_chosen}, expected at most the {num_experts} experts")
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not coefficient >= 0:
        raise ConfigError(f"router_aux_loss_coef: found {coefficient!r}, expected a number of at least 0")
    return {
        "num_moe_experts": num_experts,
        "moe_router_topk": num_chosen,
        "moe_ffn_hidden_size": require_count("width of an expert", width),
        "moe_aux_loss_coeff": coefficient,
    }


def dense_layers(config: PretrainedConfig, is_moe: Callable[[int], bool]) -> dict[str, Any]:
    """The layers, counted from zero, that are an MoE where not all are.

    Raises:
        ConfigError: none is.
    """
    pattern = [int(is_moe(layer)) for layer in range(config.num_hidden_layers)]
    if not any(pattern):
        raise ConfigError(
            f"model_type: found {config.model_type} without a layer of experts, expected one at least; name the family "
            "of dense models that it is one of"
        )
    return {} if all(pattern) else {"moe_layer_freq": pattern}


def refuse(config: PretrainedConfig, refusals: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Return if every key of `refusals`, {key: (what its value must fulfil, why)}, has a value that is fine.

    Raises:
        ConfigError: one has not; the value None stands for a key that is not there.
    """
    for key, (is_fine, reason) in refusals.items():
        found = getattr(config, key, None)
        if not is_fine(found):
            expected = reason if reason.startswith("expected") else f"expected another value: {reason}"
            raise ConfigError(f"{key}: found {found!r}, {expected}")


def count(config: PretrainedConfig, key: str, *, default: int | None = None, least: int = 1) -> int:
    """The whole number under `key`, or `default` where it is null or not there.

    Raises:
        ConfigError: it is no whole number, or below `least`.
    """
    found = getattr(config, key, None)
    return require_count(key, default if found is None else found, least=least)


def require_count(key: str, value: Any, *, least: int = 1) -> int:
    """`value`, which is a whole number of at least `least`.

    Raises:
        ConfigError: it is not; `key` is named.
    """
    most = MAX_COUNTS.get(key, MAX_COUNT)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{key}: found {value!r}, expected an integer of at least {least} and at most {most}")
    return value


def number(config: PretrainedConfig, key: str) -> float:
    """The number above 0 under `key`.

    Raises:
        ConfigError: it is none.
    """
    found = getattr(config, key, None)
    if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
        raise ConfigError(f"{key}: found {found!r}, expected a number above 0")
    return float(found)
