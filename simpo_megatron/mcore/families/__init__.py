"""Model families, a file each: config.json translated to megatron-core's arguments, or refused if it cannot be."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.family import Family, WeightNames, activation, count, refuse, shared_options
from simpo_megatron.mcore.hf import check_counts, configuration, read_hf_json, rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "FAMILIES",
    "ModelDescription",
    "describe_hf_config",
    "describe_hf_model",
    "padded_vocab_size",
    "require_family",
    "stated_sizes",
]

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for module in pkgutil.iter_modules(__path__)
    for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES
}
"""Every family by the `model_type` of its config.json."""

_REFUSALS = {
    "quantization_config": (
        lambda quantization: not quantization,
        "quantized weights cannot be trained; give the original ones, or dequantized ones (of mxfp4: from_pretrained "
        "with Mxfp4Config(dequantize=True), then save_pretrained)",
    ),
}
"""Keys that are refused in any family."""

_OTHER_NAMES = {"num_experts": "num_local_experts", "num_experts_per_tok": "moe_k"}
"""Keys that some classes of transformers write by another name (their `attribute_map`)."""

_ELSEWHERE = {"kimi_k2": "deepseek_v3"}
"""Names that only code in the folder knows, by the family that the code copies.

Source: vllm.transformers_utils.config, which reads them so.
"""


@dataclass(frozen=True)
class ModelDescription:
    """A model's architecture; the choices of a run (dtype, parallelism, recompute) are not in here."""

    family: str
    """`model_type` of config.json."""
    transformer: dict[str, Any]
    """Keyword arguments of our TransformerConfig."""
    gpt: dict[str, Any]
    """Keyword arguments of megatron's GPTModel, vocabulary apart."""
    vocab_size: int
    """Token ids of the model, before the padding that tensor parallelism needs."""
    hf_config: dict[str, Any]
    """config.json as read."""
    rope: dict[str, Any]
    """The rotary embedding, by transformers' names: rope_type, rope_theta, partial_rotary_factor, ..."""
    padding_idx: int | None = None
    """The token id whose row of the embedding gets no gradient as an input, as in transformers; None: no id's."""

    def is_moe_layer(self, layer: int) -> bool:
        """True where the layer, counted from zero, has experts in the place of an MLP."""
        pattern = self.transformer.get("moe_layer_freq")
        return "num_moe_experts" in self.transformer and (pattern is None or bool(pattern[layer]))

    @property
    def names(self) -> WeightNames:
        """Names of the weights in a folder."""
        return FAMILIES[self.family].names


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


def require_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of `config`, the object in a config.json; `where` begins a refusal.

    Raises:
        ConfigError: it is of none.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ConfigError(f"{where}: model_type: found {_of_no_family(config)}")
    return family


def stated_sizes(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Layers, heads, widths and experts that `config`, the object in a config.json, states itself, by megatron's names.

    They are those of its description, which needs transformers and torch for what a config.json leaves out. None where
    one is left out or wrong. The positions of the model are `max_position_embeddings`.
    """
    # Classes differ in what they take for this one.
    if config.get("num_key_value_heads") is None:
        return None
    stated: Any = SimpleNamespace(**config)
    for name, written in _OTHER_NAMES.items():
        if written in config:
            setattr(stated, name, config.get(name, config[written]))
    try:
        check_counts(config)
        options = {**shared_options(stated), **FAMILIES[str(config["model_type"])].options(stated)}
        options["max_position_embeddings"] = count(stated, "max_position_embeddings")
    # Whatever is not there or not right is told by who describes the model.
    except (ConfigError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return None
    if config.get("head_dim") is None and "latent" not in options:
        del options["kv_channels"]
    return options


def _described(config: dict[str, Any], where: str) -> ModelDescription:
    from simpo_megatron.mcore.attention.rotary import check_rope

    family = require_family(config, where)
    try:
        check_counts(config)
        normalised = configuration(config)
        refuse(normalised, _REFUSALS)
        _require_causal(normalised)
        transformer = {
            **shared_options(normalised),
            "activation_func": activation(normalised, "hidden_act"),
            **family.options(normalised),
        }
        rope = rope_parameters(normalised)
        fraction = rope.get("partial_rotary_factor") or 1.0
        if fraction != 1 and not family.turns_in_part:
            raise ConfigError(f"partial_rotary_factor: found {fraction}, expected 1 for {family.model_type}")
        latent = transformer.get("latent")
        head_size = transformer["kv_channels"] if latent is None else latent.qk_pos_emb_head_dim
        check_rope(config, rope, int(head_size * fraction))
        gpt = {
            "position_embedding_type": "rope",
            "rotary_percent": float(fraction),
            "rotary_base": rope["rope_theta"],
            "share_embeddings_and_output_weights": bool(normalised.tie_word_embeddings),
            "max_sequence_length": count(normalised, "max_position_embeddings"),
        }
        vocab_size = count(normalised, "vocab_size")
        padding_idx = _padding_idx(normalised, vocab_size)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return ModelDescription(family.model_type, transformer, gpt, vocab_size, config, rope, padding_idx)


def _require_causal(config: PretrainedConfig) -> None:
    # transformers takes null for False.
    if not (found := getattr(config, "is_causal", True)):
        raise ConfigError(
            f"is_causal: found {found!r}, expected true or no such key: a model that looks ahead cannot be trained to "
            "predict the next token"
        )


def _padding_idx(config: PretrainedConfig, vocab_size: int) -> int | None:
    """`pad_token_id`, which every family of transformers gives to its torch.nn.Embedding.

    Raises:
        ConfigError: it is no row of the embedding, which torch refuses.
    """
    found = config.pad_token_id
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not -vocab_size <= found < vocab_size:
        raise ConfigError(
            f"pad_token_id: found {found!r}, expected null or an id below the vocab_size {vocab_size}; transformers "
            "cannot load it either"
        )
    # As torch counts: from the end where it is negative.
    return found % vocab_size


def _of_no_family(config: Mapping[str, Any]) -> str:
    """The model_type, and what is expected in its place."""
    found = config.get("model_type")
    if found in _ELSEWHERE:
        return (
            f"{found!r}, expected {_ELSEWHERE[found]}, whose architecture it has; write that into config.json, and "
            "take auto_map out"
        )
    families = ", ".join(sorted(FAMILIES))
    if "text_config" in config:
        return f"{found!r}, a model of more than text, expected its text model alone, of one of {families}"
    return f"{found!r}, expected one of {families}"


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int, divisor: int = 128) -> int:
    """The smallest multiple of `divisor` * tensor ranks that holds `vocab_size` rows, as Megatron pads."""
    multiple = divisor * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
