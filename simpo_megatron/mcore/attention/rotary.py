"""Rotary embeddings of long contexts: frequencies computed by transformers' own functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.hf import configuration, kind_of_rope, rope_parameters

SCALED = ("linear", "llama3", "yarn", "longrope")
"""Types that change the frequencies once and for all; `default` leaves them as they are."""
_REFUSED = {
    "dynamic": ", whose frequencies change with the length of each sequence, while a pack of many has one table",
}


@dataclass(frozen=True)
class RotaryFrequencies:
    """The numbers that replace megatron's in its rotary embedding."""

    inverse: Tensor
    """fp32 [rotary size / 2], radians per position, on the CPU."""
    attention_factor: float
    """Factor of sine and cosine, in queries and keys alike."""


def scaled_frequencies(hf_config: Mapping[str, Any], max_length: int) -> RotaryFrequencies | None:
    """The frequencies of a model that scales them; None for other models, where megatron's are right.

    Args:
        max_length: tokens of the longest sequence. A longrope model has two sets of frequencies and takes, for a whole
            run, the one for this length; transformers would pick one for each batch.

    Source: transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = configuration(hf_config)
    kind = rope_parameters(config)["rope_type"]
    if kind == "default":
        return None
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=max_length, **kind_of_rope(config))
    return RotaryFrequencies(inverse.float(), float(factor))


def check_rope(hf_config: Mapping[str, Any], rope: Mapping[str, Any], rotary_size: int) -> None:
    """Return if the rotary embedding `rope` is supported for heads with `rotary_size` rotated elements.

    Raises:
        ConfigError: its type is unknown, or its numbers do not fit the type.
    """
    kind = rope["rope_type"]
    if kind not in ("default", *SCALED):
        raise ConfigError(
            f"rope_type: found {kind!r}{_REFUSED.get(kind, '')}, expected default or one of {', '.join(SCALED)}"
        )
    theta, factor = rope.get("rope_theta"), rope.get("factor")
    if not _is_at_least(1, theta):
        raise ConfigError(f"rope_theta: found {theta!r}, expected a number of at least 1")
    # yarn and longrope may give the factor by two lengths instead.
    by_lengths = factor is None and kind in ("yarn", "longrope")
    if kind != "default" and not by_lengths and not _is_at_least(1, factor):
        raise ConfigError(f"rope factor: found {factor!r}, expected a number of at least 1")
    try:
        found = scaled_frequencies(hf_config, max_length=1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ConfigError(f"rope_parameters: found {error} missing or wrong, expected those of {kind}") from None
    if found is None:
        return
    if (
        found.inverse.shape != (rotary_size // 2,)
        or not found.inverse.isfinite().all()
        or not found.attention_factor > 0
    ):
        raise ConfigError(
            f"rope_parameters: found {len(found.inverse)} frequencies and an attention factor of "
            f"{found.attention_factor:g}, expected {rotary_size // 2} finite ones and a factor above 0"
        )


def concentration(attention_factor: float) -> dict[str, Any]:
    """Options of megatron's TransformerConfig that make attention multiply sine and cosine by `attention_factor`.

    megatron computes the factor as in YaRN: (0.1 mscale log(scale) + 1) / (0.1 mscale_all_dim log(scale) + 1).

    Source: megatron.core.models.common.embeddings.yarn_rotary_pos_embedding._yarn_get_concentration_factor_from_config.
    """
    return {
        "yarn_rotary_scaling_factor": math.e,
        "yarn_mscale": 10 * (attention_factor - 1),
        "yarn_mscale_all_dim": 0.0,
    }


def _is_at_least(least: float, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf
