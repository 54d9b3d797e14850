"""The options of what watches over a run."""

from __future__ import annotations

from dataclasses import dataclass

from simpo_megatron.config.checks import require_positive
from simpo_megatron.errors import require

MONITORS = ("loss_spike", "saturated", "length_correlation", "displacement", "repetition")
"""What `stop_on` may name."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What watches over a run, which has no reference model to hold on to; null switches a monitor off."""

    probe_memory: bool = True
    """Run the largest packs once, without effect, before the first step: memory that does not suffice shows at
    once or never."""

    monitor_window: int = 32
    """Log lines that the monitors look back on; they are silent before a quarter of them."""

    max_loss_spike: float | None = 10.0
    """Warn, with the pairs, of a loss that lies more than this many robust standard deviations (1.4826 times the
    median distance from the median, but no less than 0.01 nor than a hundredth of the median) above the median of the
    window."""

    max_saturated: float | None = 0.9
    """Warn when the share of saturated pairs, whose loss is below 0.01 and has no gradient left, has a median above
    this in the window."""

    max_length_correlation: float | None = 0.8
    """Warn when the correlation of rewards with response lengths has a median beyond this, up or down, in the
    window."""

    max_displacement: float | None = 1.0
    """Warn when the average log-prob of held-out chosen responses has fallen by more than this many nats per token
    since step 0."""

    max_repetition: float | None = 0.5
    """Warn when more than this share of the 4-grams of greedy continuations of held-out prompts is repeated, and more
    than at step 0."""

    repetition_prompts: int = 0
    """Held-out prompts to continue greedily at every evaluation; 0 for none. Each token is a forward pass."""

    repetition_tokens: int = 64
    """Tokens of a continuation, at most."""

    stop_on: tuple[str, ...] = ()
    """Monitors (loss_spike, saturated, length_correlation, displacement, repetition) that stop the run instead of
    warning alone, without saving what they found; the last two evaluate before every checkpoint but a signal's."""

    def __post_init__(self) -> None:
        require_positive(self, "monitor_window", "max_loss_spike", "max_displacement", "repetition_tokens")
        require(self.repetition_prompts >= 0, "repetition_prompts", self.repetition_prompts, "0 or more")
        for key in ("max_saturated", "max_length_correlation", "max_repetition"):
            found = getattr(self, key)
            require(found is None or 0 < found < 1, key, found, "a number between 0 and 1")
        for name in self.stop_on:
            require(name in MONITORS, "stop_on", name, " or ".join(MONITORS))
            require(getattr(self, f"max_{name}") is not None, "stop_on", name, f"max_{name} not null with it")
        require(
            "repetition" not in self.stop_on or self.repetition_prompts > 0,
            "stop_on",
            "repetition",
            "repetition_prompts above 0 with it",
        )
