"""Options of the training monitors."""

from __future__ import annotations

from dataclasses import dataclass

from simpo_megatron.errors import require, require_positive
from simpo_megatron.option_field import option

MONITORS = ("loss_spike", "saturated", "length_correlation", "displacement", "repetition")
"""Names that `stop_on` takes."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Training monitors; set a threshold to null to disable one."""

    probe_memory: bool = option(
        True,
        "Run the largest packs once before the first step, without effect, so that too little memory shows at once.",
    )
    monitor_window: int = option(
        32, "Log lines that the monitors look back on; they are silent before a quarter of them."
    )
    max_loss_spike: float | None = option(
        10.0,
        "Warn, with the pairs, of a loss more than this many robust standard deviations above the median "
        "of the window. One is 1.4826 times the median distance from the median, and at least 0.01 and a "
        "hundredth of the median.",
    )
    max_saturated: float | None = option(
        0.9,
        "Warn when the fraction of saturated pairs (loss below 0.01, no gradient left) has a median "
        "above this in the window.",
    )
    max_length_correlation: float | None = option(
        0.8,
        "Warn when the correlation of rewards with response lengths has a median above this or below its "
        "negative in the window.",
    )
    max_displacement: float | None = option(
        1.0,
        "Warn when the mean log-prob of the chosen validation responses fell by more than this many nats "
        "per token since step 0.",
    )
    max_repetition: float | None = option(
        0.5,
        "Warn when more than this fraction of the 4-grams of greedy continuations of validation prompts "
        "is repeated, and more than at step 0.",
    )
    repetition_prompts: int = option(
        0, "Validation prompts to continue greedily at every evaluation; 0 for none. Each token is a forward pass."
    )
    repetition_tokens: int = option(64, "Most tokens of a continuation.")
    stop_on: tuple[str, ...] = option(
        (),
        "Monitors that stop the run instead of warning: loss_spike, saturated, length_correlation, "
        "displacement, repetition. The step they found is not saved; the last two evaluate before every "
        "checkpoint but a signal's.",
        metavar="NAME",
    )

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
