"""The keys of low-rank adapters in each dialect; other ways to train only a part of a model are refused."""

from __future__ import annotations

from typing import Any

from simpo_megatron.config.lora_section import LORA_PARTS
from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.rules import Asked, Different, Only, Rule, Translated
from simpo_megatron.nemo.translations import each

_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
_NONE = (None, False, "none")
_BY_DEFAULT = 32
# The first five are read. An adapter starts as A drawn at random and B zero, in the dtype of the weights, whatever the
# others say; without the switch they are halves like the first.
_OF_A_LORA = """dim alpha dropout dropout_position target_modules lora_A_init_method lora_B_init_method lora_dtype
a2a_experimental sequence_parallel_input_regather normalize_moe_lora share_expert_adapters experts_shared_outer_loras"""
# NeMo 1's names of layers.
_LAYERS = {
    "attention_qkv": ("linear_qkv",),
    "attention_dense": ("linear_proj",),
    "mlp_fc1": ("linear_fc1",),
    "mlp_fc2": ("linear_fc2",),
    "attention": ("linear_qkv", "linear_proj"),
    "mlp": ("linear_fc1", "linear_fc2"),
    "all": ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
}


def megatron_lora(switch: str, prefix: str, example: str) -> dict[str, Rule]:
    """The keys of Megatron-Bridge's LoRA under `prefix`, which NeMo 2 and NeMo-RL share; `switch` asks for adapters.

    It is true, or names the class, such as `example`.
    """
    reads = tuple(prefix + name for name in _OF_A_LORA.split())

    def adapters(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
        if value in _NONE:
            return "all weights are trained"
        _require_lora(value)
        dropout = asked.get(f"{prefix}dropout") or 0.0
        if dropout and asked.get(f"{prefix}dropout_position") == "post":
            raise ConfigError(f"found {prefix}dropout {dropout} and position post, expected pre: before the adapter")
        targets = asked.get(f"{prefix}target_modules")
        settings = {
            "lora_rank": _unless_none(asked.get(f"{prefix}dim"), _BY_DEFAULT),
            "lora_alpha": _unless_none(asked.get(f"{prefix}alpha"), _BY_DEFAULT),
            "lora_dropout": dropout,
        }
        if targets == []:  # peft/module_matcher.py of Megatron-Bridge
            return Different("adapters of every linear layer there, of attention and MLP here", settings)
        return settings | ({"lora_targets": targets} if targets else {})

    return {
        switch: Translated(adapters, _OPTIONS, reads, example),
        f"{prefix}exclude_modules": Only((None, []), "name the layers that get adapters in target_modules"),
    }


def nemo1_lora(prefix: str) -> dict[str, Rule]:
    """The keys of NeMo 1's `peft` section."""
    tuning = f"{prefix}lora_tuning."

    def adapters(value: Any, asked: Asked) -> dict[str, Any] | str:
        if value in _NONE:
            return "all weights are trained"
        _require_lora(value)
        if asked.get(f"{tuning}adapter_dropout"):
            raise ConfigError(f"found {tuning}adapter_dropout above 0, expected 0: NeMo 1 drops what leaves an adapter")
        named = asked.get(f"{tuning}target_modules") or ["attention_qkv"]
        if not isinstance(named, list):
            raise ConfigError(f"found {named!r} as {tuning}target_modules, expected a list of {', '.join(_LAYERS)}")
        unknown = [name for name in named if name not in _LAYERS]
        if unknown:
            raise ConfigError(f"found {unknown[0]!r} in {tuning}target_modules, expected {', '.join(_LAYERS)}")
        layers = [layer for name in named for layer in _LAYERS[name]]
        if (variant := asked.get(f"{tuning}variant")) == "canonical":
            layers = [part for layer in layers for part in LORA_PARTS.get(layer, (layer,))]
        elif variant not in (None, "nemo"):
            raise ConfigError(f"found {variant!r} as {tuning}variant, expected nemo or canonical")
        rank = _unless_none(asked.get(f"{tuning}adapter_dim"), _BY_DEFAULT)
        return {
            "lora_rank": rank,
            "lora_alpha": _unless_none(asked.get(f"{tuning}alpha"), rank),
            "lora_targets": layers,
        }

    return {
        f"{prefix}peft_scheme": Translated(adapters, _OPTIONS, (f"{prefix}*",), "lora"),
        f"{prefix}restore_from_path": Only((None,), "adapters are not read from .nemo files"),
        f"{tuning}layer_selection": Only((None,), "every layer gets adapters"),
        f"{tuning}weight_tying": Only((False,), "layers do not share adapters"),
        **each(prefix, "restore_from_ckpt.*", Only((None,), "adapters are not read from NeMo's checkpoints")),
    }


def _unless_none(value: Any, default: int) -> Any:
    """`value`, or `default` where it is None; a 0 stays, and its option refuses it."""
    return default if value is None else value


def _require_lora(value: Any) -> None:
    name = str(value).rsplit(".", 1)[-1]
    if value is not True and name.lower() != "lora":
        raise ConfigError(f"found {value!r}, expected LoRA, the one kind of adapter here, or none")
