"""Options of low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from simpo_megatron.config.checks import require_writable_name
from simpo_megatron.errors import require, require_positive
from simpo_megatron.option_field import option

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

OF_LATENT_ATTENTION = (
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
)
"""Layers that latent attention has, some of them, in the place of linear_qkv."""


def adapted_layers(targets: Sequence[str]) -> tuple[str, ...]:
    """The layers that `targets` name, by megatron's names in any kind of attention."""
    return (*targets, *(OF_LATENT_ATTENTION if "linear_qkv" in targets else ()))


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters, trained instead of the model's own weights."""

    lora_rank: int | None = option(None, "Train LoRA adapters of this rank, not the model's weights.", everyday=True)
    lora_alpha: float | None = option(
        None,
        "Scale of the adapters: their output is multiplied by lora_alpha / lora_rank; a factor of 1 when not given.",
    )
    lora_dropout: float = option(
        0.0, "Dropout on the input of an adapter. Off by default: it makes the two responses of a pair incomparable."
    )
    lora_targets: tuple[str, ...] = option(
        LORA_TARGETS,
        "Layers that get adapters, by megatron's names: linear_qkv, linear_proj (attention), linear_fc1, "
        "linear_fc2 (MLP); all when not given.",
        metavar="NAME",
    )
    export_adapter: str | None = option(None, "Folder for the trained adapters in PEFT's format.", metavar="DIR")

    @property
    def scale(self) -> float:
        """Factor on the adapters' output."""
        if self.lora_alpha is None or self.lora_rank is None:
            return 1.0
        return self.lora_alpha / self.lora_rank

    def __post_init__(self) -> None:
        require_positive(self, "lora_rank", "lora_alpha")
        require_writable_name(self, "export_adapter")
        dropout = self.lora_dropout
        require(0 <= dropout < 1, "lora_dropout", dropout, "a number from 0 up to, not including, 1")
        known = set(LORA_TARGETS)
        is_choice = set(self.lora_targets) <= known and 0 < len(self.lora_targets) == len(set(self.lora_targets))
        one_or_more = f"one or more of {', '.join(LORA_TARGETS)}, each once"
        require(is_choice, "lora_targets", " ".join(self.lora_targets), one_or_more)
        if self.lora_rank is None:
            needs_rank = "lora_rank with it; there are no adapters without"
            for entry in fields(self):
                found = getattr(self, entry.name)
                require(found == entry.default, entry.name, found, needs_rank)
