"""config.json as transformers' own configuration class understands it: defaults, and the names of versions 4 and 5."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import ConfigError, StoppedBySignal

if TYPE_CHECKING:
    from transformers import PretrainedConfig


FULL, WINDOWED = "full_attention", "sliding_attention"
"""Kinds of a layer's attention, as `layer_types` of config.json has them."""

MAX_COUNT = 1 << 31
MAX_COUNTS = {
    "num_hidden_layers": 1024,
    "num_local_experts": 1024,
    "num_experts": 1024,
    "n_routed_experts": 1024,
    "num_attention_heads": 1 << 16,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 26,
}
"""The largest counts by their keys: past these no model is, and work that counts layers or experts would not end."""


def check_counts(hf_config: Mapping[str, Any]) -> None:
    """Return if no count in a config.json is larger than a model can have, so that transformers can be given it.

    Raises:
        ConfigError: one is larger.
    """
    for key, most in MAX_COUNTS.items():
        found = hf_config.get(key)
        if isinstance(found, int | float) and not -most <= found <= most:
            raise ConfigError(f"{key}: found {found!r}, expected an integer of at least 1 and at most {most}")


def configuration(hf_config: Mapping[str, Any]) -> PretrainedConfig:
    """transformers' configuration object of a config.json whose family it knows; no code of the folder is run.

    Raises:
        ConfigError: transformers refuses it.
    """
    return _configuration(json.dumps(hf_config, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _configuration(text: str) -> PretrainedConfig:
    """The same for a file's text; cached, so that transformers' warnings about it come once."""
    from transformers import CONFIG_MAPPING, __version__

    content = json.loads(text)
    if int(__version__.partition(".")[0]) < 5:
        content = _in_names_of_4(content)
    kind = CONFIG_MAPPING[content["model_type"]]
    try:
        return kind.from_dict(content)
    # Each class checks in its own way: by assertions, by exceptions of several kinds.
    except StoppedBySignal:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{kind.__name__} of transformers: found {reason}, expected a config.json that it takes"
        ) from None


def _in_names_of_4(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the rotary embedding under transformers 4's names; existing values stay."""
    rope = content.pop("rope_parameters", None)
    if not rope:
        return content
    if FULL in rope:
        content = {"rope_local_base_freq": rope.get(WINDOWED, {}).get("rope_theta", 1e4)} | content
        rope = rope[FULL]
    kind = rope.get("rope_type", rope.get("type", "default"))
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if kind != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
    return older | content


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary embedding of `config` by the names of transformers 5: rope_type, rope_theta and those of the type.

    Where layers with a window have one of their own, it is that of the others.
    """
    found = getattr(config, "rope_parameters", None)
    if found is not None and FULL in found:
        found = found[FULL]
    if found is None:
        found = {**(getattr(config, "rope_scaling", None) or {}), "rope_theta": getattr(config, "rope_theta", 10000.0)}
        if getattr(config, "partial_rotary_factor", None) is not None:
            found["partial_rotary_factor"] = config.partial_rotary_factor
    return {"rope_type": found.get("rope_type", found.get("type", "default")), **found}


def windowed_rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The same of the layers with a window, in a family that has one for each kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if found is None:
        return {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    return {"rope_type": "default", **found[WINDOWED]}


def kind_of_rope(config: PretrainedConfig) -> dict[str, str]:
    """The argument by which transformers' functions find that of `rope_parameters`, where there are two."""
    found = getattr(config, "rope_parameters", None) or {}
    return {"layer_type": FULL} if FULL in found else {}
