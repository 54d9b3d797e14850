"""Hugging Face's config.json as megatron-core's arguments; what it would compute differently is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.hf_files import read_hf_json

# Past these no model is, and work that counts layers or experts would not end.
_LARGEST_COUNT = 1 << 31
_MOST = {
    "num_hidden_layers": 1024,
    "num_local_experts": 1024,
    "num_experts": 1024,
    "num_attention_heads": 1 << 16,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 26,
}
_FLAGS = ("attention_bias", "mlp_bias", "norm_topk_prob", "tie_word_embeddings", "use_sliding_window")

_FULL, _WINDOWED = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelDescription:
    """A model's architecture; the choices of a run (dtype, parallelism, recompute) are not in here."""

    family: str
    """`model_type` of config.json."""
    transformer: dict[str, Any]
    """Keyword arguments of megatron's TransformerConfig."""
    gpt: dict[str, Any]
    """Keyword arguments of megatron's GPTModel, vocabulary apart."""
    vocab_size: int
    """Token ids of the model, before the padding that tensor parallelism needs."""
    hf_config: dict[str, Any]
    """config.json as read."""


def describe_hf_model(folder: str | Path) -> ModelDescription:
    """The architecture that `folder`/config.json describes, as written by transformers 4 or 5.

    Raises:
        CheckpointError: the folder or its config.json is missing or unreadable.
        ConfigError: the family, or an option of it, is not one that megatron-core computes like transformers.
    """
    return describe_hf_config(read_hf_json(folder, "config.json"), str(Path(folder) / "config.json"))


def describe_hf_config(config: dict[str, Any], where: str) -> ModelDescription:
    """The architecture that `config`, the object in a config.json, describes; `where` begins a refusal.

    Raises:
        ConfigError: the family, or an option of it, is not one that megatron-core computes like transformers.
    """
    try:
        return _described(config, where)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ConfigError(
            f"{where}: found values that no model has ({type(error).__name__}: {error}), expected them as transformers "
            "writes them"
        ) from None


def _described(config: dict[str, Any], where: str) -> ModelDescription:
    family = config.get("model_type")
    if family not in _FAMILY_OPTIONS:
        raise ConfigError(
            f"{where}: model_type: found {family!r}{_WHY_NOT.get(family, '')}, expected one of "
            f"{', '.join(sorted(_FAMILY_OPTIONS))}"
        )
    try:
        _refuse(config, _COMMON_REFUSALS)
        for key in _FLAGS:
            if not isinstance(config.get(key), bool | None):
                raise ConfigError(f"{key}: found {config[key]!r}, expected true or false")
        transformer = _transformer_arguments(config)
        transformer.update(_FAMILY_OPTIONS[family](config))
        gpt = {
            "position_embedding_type": "rope",
            **_rope_arguments(config),
            "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", family == "gemma2")),
            "max_sequence_length": _count(config, "max_position_embeddings"),
        }
        vocab_size = _count(config, "vocab_size")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return ModelDescription(family, transformer, gpt, vocab_size, config)


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int, divisor: int = 128) -> int:
    """The smallest multiple of `divisor` * tensor ranks that holds `vocab_size` rows, as Megatron pads."""
    multiple = divisor * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def _transformer_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments that all families share: pre-norm blocks of RMSNorm, grouped-query attention and a gated SiLU MLP."""
    num_heads = _count(config, "num_attention_heads")
    num_groups = _count(config, "num_key_value_heads") if config.get("num_key_value_heads") else num_heads
    if num_heads % num_groups:
        raise ConfigError(
            f"num_attention_heads: found {num_heads}, expected a multiple of num_key_value_heads {num_groups}"
        )
    hidden_size = _count(config, "hidden_size")
    epsilon = config.get("rms_norm_eps")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ConfigError(f"rms_norm_eps: found {epsilon!r}, expected a number between 0 and 1")
    return {
        "num_layers": _count(config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": _count(config, "intermediate_size"),
        "num_attention_heads": num_heads,
        "num_query_groups": num_groups,
        "kv_channels": _count(config, "head_dim") if config.get("head_dim") else hidden_size // num_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": epsilon,
        "gated_linear_unit": True,
        "activation_func": _activation(config),
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    }


def gelu_tanh(gate: Tensor) -> Tensor:
    """The gelu that transformers calls `gelu_pytorch_tanh`."""
    return F.gelu(gate, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "swish": F.silu, "gelu_pytorch_tanh": gelu_tanh}
_DEFAULT_ACTIVATIONS = {"hidden_activation": "gelu_pytorch_tanh"}


def _activation(config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    key = "hidden_activation" if config["model_type"] == "gemma2" else "hidden_act"
    found = config.get(key, _DEFAULT_ACTIVATIONS.get(key))
    if found not in _ACTIVATIONS:
        raise ConfigError(f"{key}: found {found!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[found]


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention_bias != mlp_bias:
        raise ConfigError(
            f"attention_bias: found {attention_bias} with mlp_bias {mlp_bias}, expected both or none: megatron-core's "
            "linear layers have biases all or none"
        )
    return {"add_bias_linear": mlp_bias, **_same_window_everywhere(config, None)}


def _mistral(config: dict[str, Any]) -> dict[str, Any]:
    return _same_window_everywhere(config, config.get("sliding_window", 4096))


def _phi3(config: dict[str, Any]) -> dict[str, Any]:
    return _same_window_everywhere(config, config.get("sliding_window"))


def _gemma2(config: dict[str, Any]) -> dict[str, Any]:
    _refuse(config, _GEMMA2_REFUSALS)
    alternating = [(_FULL, _WINDOWED)[i % 2 == 0] for i in range(config["num_hidden_layers"])]
    return {
        "kv_channels": _count(config, "head_dim", default=256),
        "softmax_scale": _count(config, "query_pre_attn_scalar", default=256) ** -0.5,
        "layernorm_zero_centered_gamma": True,
        "post_layernorms": True,
        "embedding_multiplier": config["hidden_size"] ** 0.5,
        "attn_logit_softcapping": _soft_cap(config, "attn_logit_softcapping", default=50.0),
        "final_logit_softcapping": _soft_cap(config, "final_logit_softcapping", default=30.0),
        **_sliding_window(config, config.get("sliding_window", 4096), config.get("layer_types") or alternating),
    }


def _soft_cap(config: dict[str, Any], key: str, *, default: float) -> float | None:
    found = config.get(key, default)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float) or not found > 0):
        raise ConfigError(f"{key}: found {found!r}, expected a number above 0, or null for no cap")
    return found


def _mixtral(config: dict[str, Any]) -> dict[str, Any]:
    _refuse(config, _MIXTRAL_REFUSALS)
    return {
        **_experts(config, "num_local_experts", config.get("intermediate_size")),
        **_same_window_everywhere(config, config.get("sliding_window")),
    }


def _qwen3_moe(config: dict[str, Any]) -> dict[str, Any]:
    _refuse(config, _QWEN3_MOE_REFUSALS)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    # transformers 4 writes num_experts, 5 num_local_experts.
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    return {
        "qk_layernorm": True,
        **_experts(config, key, config.get("moe_intermediate_size")),
        # The softmax over all experts, or only over the chosen ones.
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        **_same_window_everywhere(config, window),
    }


def _experts(config: dict[str, Any], key: str, width: Any) -> dict[str, Any]:
    """An MoE of `config[key]` experts of `width` in every layer."""
    num_experts, num_chosen = _count(config, key), _count(config, "num_experts_per_tok")
    if num_chosen > num_experts:
        raise ConfigError(f"num_experts_per_tok: found {num_chosen}, expected at most {key} {num_experts}")
    coefficient = config.get("router_aux_loss_coef", 0.001)
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not coefficient >= 0:
        raise ConfigError(f"router_aux_loss_coef: found {coefficient!r}, expected a number of at least 0")
    return {
        "num_moe_experts": num_experts,
        "moe_router_topk": num_chosen,
        "moe_ffn_hidden_size": _count({"width of an expert": width}, "width of an expert"),
        "moe_aux_loss_coeff": coefficient,
    }


def _qwen2(config: dict[str, Any]) -> dict[str, Any]:
    return {"add_qkv_bias": True, **_qwen_window(config)}


def _qwen3(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("attention_bias"):
        raise ConfigError(
            "attention_bias: found true without biases in the MLP, expected false: megatron-core's linear layers have "
            "biases all or none"
        )
    return {"qk_layernorm": True, **_qwen_window(config)}


def _qwen_window(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen has a window only where `use_sliding_window` says so, from layer `max_window_layers` on."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = _count(config, "max_window_layers", default=28, least=0)
    kinds = [_WINDOWED if window is not None and i >= first else _FULL for i in range(config["num_hidden_layers"])]
    return _sliding_window(config, window, config.get("layer_types") or kinds)


def _same_window_everywhere(config: dict[str, Any], window: int | None) -> dict[str, Any]:
    kind = _FULL if window is None else _WINDOWED
    if set(config.get("layer_types") or ()) - {kind}:
        raise ConfigError(
            f"layer_types: found {config['layer_types']!r}, expected {kind} in every layer of this family"
        )
    return _sliding_window(config, window, [kind] * config["num_hidden_layers"])


def _sliding_window(config: dict[str, Any], window: int | None, kinds: list[str]) -> dict[str, Any]:
    """A token sees `window` tokens of its sequence, itself the last, in the layers whose kind says so.

    Source: transformers.masking_utils.sliding_window_overlay; megatron counts the tokens to the left only.
    """
    if len(kinds) != config["num_hidden_layers"] or set(kinds) - {_FULL, _WINDOWED}:
        raise ConfigError(f"layer_types: found {kinds!r}, expected {_FULL} or {_WINDOWED} for each layer")
    windowed = [int(kind == _WINDOWED) for kind in kinds]
    if not any(windowed):
        return {}
    num_seen = _count({"sliding_window": window}, "sliding_window")
    if num_seen >= _count(config, "max_position_embeddings"):
        return {}
    return {"window_size": (num_seen - 1, 0), "window_attn_skip_freq": None if all(windowed) else windowed}


_FAMILY_OPTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gemma2": _gemma2,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
"""The arguments that each family adds to `_transformer_arguments`, or changes there."""

_WHY_NOT: dict[Any, str] = {"qwen2_moe": " yet: experts that every token passes are neither mapped nor trained"}

_COMMON_REFUSALS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quantization_config": (
        lambda quantization: not quantization,
        "quantized weights cannot be trained; give the original ones",
    ),
}
"""Key of config.json: (what its value must fulfil, why)."""
_MIXTRAL_REFUSALS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "router_jitter_noise": (lambda noise: not noise, "megatron-core adds noise to the router's input only"),
}
_QWEN3_MOE_REFUSALS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "attention_bias": (lambda bias: not bias, "megatron-core's linear layers have biases all or none"),
    "decoder_sparse_step": (lambda step: step in (None, 1), "dense layers among MoE layers are not supported yet"),
    "mlp_only_layers": (lambda layers: not layers, "dense layers among MoE layers are not supported yet"),
}
_GEMMA2_REFUSALS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "attention_bias": (lambda bias: not bias, "megatron-core's linear layers have biases all or none"),
    "use_bidirectional_attention": (lambda wanted: not wanted, "a language model attends to the left only"),
}


def _refuse(config: dict[str, Any], refusals: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    for key, (is_fine, reason) in refusals.items():
        if not is_fine(config.get(key)):
            raise ConfigError(f"{key}: found {config.get(key)!r}: {reason}")


def _rope_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_SCALINGS:
        raise ConfigError(
            f"rope_type: found {kind!r}, expected one that megatron-core has: {', '.join(_ROPE_SCALINGS)}"
        )
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if fraction != 1.0 and config["model_type"] != "phi3":
        raise ConfigError(f"partial_rotary_factor: found {fraction}, expected 1 for {config['model_type']}")
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < math.inf:
        raise ConfigError(f"rope_theta: found {base!r}, expected a number above 0")
    return {
        "rotary_percent": float(fraction),
        "rotary_base": base,
        "rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "seq_len_interpolation_factor": None,
        **_ROPE_SCALINGS[kind](rope),
    }


def _linear_rope(rope: dict[str, Any]) -> dict[str, Any]:
    return {"seq_len_interpolation_factor": _factor(rope)}


def _llama3_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Source: megatron.core RotaryEmbedding._apply_scaling, which takes the factor and fixes the rest."""
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for key, value in fixed.items():
        if rope.get(key) != value:
            raise ConfigError(
                f"rope {key}: found {rope.get(key)!r}, expected {value}, as megatron-core computes llama3"
            )
    return {"rope_scaling": True, "rope_scaling_factor": _factor(rope)}


_ROPE_SCALINGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "default": lambda rope: {},
    "linear": _linear_rope,
    "llama3": _llama3_rope,
}


def _factor(rope: dict[str, Any]) -> float:
    factor = rope.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 1:
        raise ConfigError(f"rope factor: found {factor!r}, expected a number of at least 1")
    return float(factor)


def _count(config: dict[str, Any], key: str, *, default: int | None = None, least: int = 1) -> int:
    value = config.get(key, default)
    most = _MOST.get(key, _LARGEST_COUNT)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{key}: found {value!r}, expected an integer of at least {least} and at most {most}")
    return value
