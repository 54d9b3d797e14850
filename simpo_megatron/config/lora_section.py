"""Options of low-rank adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from simpo_megatron.config.checks import require_writable_name
from simpo_megatron.errors import require, require_positive
from simpo_megatron.option_field import option

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LORA_PARTS = {
    "linear_qkv": ("linear_q", "linear_k", "linear_v"),
    "linear_fc1": ("linear_fc1_gate", "linear_fc1_up"),
}
"""The parts of a layer that megatron joins, in its order; named as targets, each gets an A of its own, as in PEFT.

Source: the names are those of Megatron-Bridge's CanonicalLoRA.
"""
_ALL_TARGETS = (*LORA_TARGETS, *(part for parts in LORA_PARTS.values() for part in parts))

OF_LATENT_ATTENTION = (
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
)
"""Layers that latent attention has, some of them, in the place of linear_qkv."""


_MAX_RANK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters, trained instead of the model's own weights."""

    lora_rank: int | None = option(None, "Train LoRA adapters of this rank, not the model's weights.", everyday=True)
    lora_alpha: float | None = option(
        None,
        "Scale of the adapters: their output is multiplied by lora_alpha / lora_rank; a factor of 1 when not given.",
    )
    use_rslora: bool = option(False, "Multiply by lora_alpha / sqrt(lora_rank) instead, as rsLoRA does.")
    lora_dropout: float = option(
        0.0, "Dropout on the input of an adapter. Off by default: it makes the two responses of a pair incomparable."
    )
    lora_targets: tuple[str, ...] = option(
        LORA_TARGETS,
        "Layers that get adapters, by megatron's names: linear_qkv, linear_proj (attention), linear_fc1, "
        "linear_fc2 (MLP); all when not given. linear_q, linear_k, linear_v, linear_fc1_gate and linear_fc1_up get an "
        "A of their own, as in PEFT.",
        metavar="NAME",
    )
    adapter: str | None = option(
        None,
        "Adapters to go on training: a PEFT folder, its hub name, or a run with adapters. They say rank, scale and "
        "layers, and the model where none is given.",
        metavar="DIR",
    )
    export_adapter: str | None = option(None, "Folder for the trained adapters in PEFT's format.", metavar="DIR")

    @property
    def scale(self) -> float:
        """Factor on the adapters' output."""
        if self.lora_alpha is None or self.lora_rank is None:
            return 1.0
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    @property
    def own_parts(self) -> dict[str, tuple[int, ...] | None]:
        """The layers with adapters, in megatron's order: None where all parts share an A, else which have their own."""
        asked = set(self.lora_targets)
        found: dict[str, tuple[int, ...] | None] = {}
        for target in LORA_TARGETS:
            parts = tuple(number for number, part in enumerate(LORA_PARTS.get(target, ())) if part in asked)
            if target in asked or parts:
                found[target] = parts or None
        return found

    @property
    def layers(self) -> dict[str, tuple[int, ...] | None]:
        """`own_parts` of the layers of any kind of attention: latent attention has others than linear_qkv."""
        return self.own_parts | (dict.fromkeys(OF_LATENT_ATTENTION) if "linear_qkv" in self.lora_targets else {})

    def __post_init__(self) -> None:
        require_positive(self, "lora_rank", "lora_alpha")
        # Files of others say them too, as JSON of any type and size.
        is_count = self.lora_rank is None or (type(self.lora_rank) is int and self.lora_rank <= _MAX_RANK)
        require(is_count, "lora_rank", self.lora_rank, f"a whole number up to {_MAX_RANK}")
        is_finite = self.lora_alpha is None or math.isfinite(self.lora_alpha)
        require(is_finite, "lora_alpha", self.lora_alpha, "a finite number")
        require_writable_name(self, "export_adapter")
        dropout = self.lora_dropout
        require(0 <= dropout < 1, "lora_dropout", dropout, "a number from 0 up to, not including, 1")
        asked = set(self.lora_targets)
        is_choice = asked <= set(_ALL_TARGETS) and 0 < len(self.lora_targets) == len(asked)
        one_or_more = f"one or more of {', '.join(_ALL_TARGETS)}, each once"
        require(is_choice, "lora_targets", " ".join(self.lora_targets), one_or_more)
        for target, parts in LORA_PARTS.items():
            is_either = target not in asked or not asked & set(parts)
            either = f"{target}, whose parts share an A, or some of {', '.join(parts)}, not both"
            require(is_either, "lora_targets", " ".join(self.lora_targets), either)
        has_alpha = self.lora_alpha is not None or not self.use_rslora
        require(has_alpha, "use_rslora", True, "lora_alpha with it; rsLoRA multiplies by lora_alpha / sqrt(lora_rank)")
        if self.lora_rank is None and self.adapter is None:
            needs_rank = "lora_rank with it; there are no adapters without"
            for entry in fields(self):
                found = getattr(self, entry.name)
                require(found == entry.default, entry.name, found, needs_rank)
