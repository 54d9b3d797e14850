"""Logits capped by a hyperbolic tangent, as in Gemma-2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simpo_megatron.errors import ConfigError


@dataclass(frozen=True)
class SoftCap:
    """cap * tanh(logit / cap), and its slope.

    Raises:
        ConfigError: the cap is no number above 0.
    """

    cap: float

    def __post_init__(self) -> None:
        if not 0 < self.cap < float("inf"):
            raise ConfigError(f"logit_softcap: found {self.cap!r}, expected a number above 0, or None for no cap")

    def apply_(self, logits: Tensor) -> Tensor:
        """The capped logits, in place; the logits must be fp32 at least."""
        return logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, capped: Tensor) -> Tensor:
        """d capped / d logit of logits that were capped, in a tensor of its own, in fp32 at least."""
        wide = capped.to(torch.promote_types(capped.dtype, torch.float32))
        return torch.div(wide, self.cap).square_().neg_().add_(1)
