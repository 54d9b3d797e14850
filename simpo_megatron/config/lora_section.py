"""The options of low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass, fields

from simpo_megatron.config.checks import require_positive, require_writable_name
from simpo_megatron.errors import require

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters, trained instead of the model's own weights."""

    lora_rank: int | None = None
    """Rank of the adapters; with it the model's own weights, embedding and head stay as they are."""

    lora_alpha: float | None = None
    """What an adapter adds is multiplied by lora_alpha / lora_rank; the rank itself (a factor of 1) when not given."""

    lora_dropout: float = 0.0
    """Dropout on what enters an adapter; off, for it makes the two responses of a pair incomparable."""

    lora_targets: tuple[str, ...] = LORA_TARGETS
    """Layers that get adapters, by megatron's names: linear_qkv, linear_proj (attention), linear_fc1, linear_fc2
    (MLP); all when not given."""

    export_adapter: str | None = None
    """Folder for the trained adapters in PEFT's form."""

    @property
    def scale(self) -> float:
        """The factor of what the adapters add."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

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
            needs_rank = "lora_rank with it: there are no adapters without"
            for entry in fields(self):
                found = getattr(self, entry.name)
                require(found == entry.default, entry.name, found, needs_rank)
