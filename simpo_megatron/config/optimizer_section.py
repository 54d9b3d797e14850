"""Options of AdamW, of its learning-rate schedule, and of the length of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from simpo_megatron.errors import require, require_positive
from simpo_megatron.option_field import option


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = option(
        5e-7,
        "Peak learning rate of AdamW. The authors search 3e-7 to 1e-6; at 1e-5 models fell into repetition.",
        everyday=True,
    )
    min_lr: float = option(0.0, "Learning rate at the end of the decay.")
    lr_warmup_fraction: float = option(
        0.1, "Fraction of lr_decay_iters over which the learning rate warms up from lr_warmup_init."
    )
    lr_warmup_iters: int | None = option(None, "Steps of the warm-up, instead of lr_warmup_fraction.")
    lr_warmup_init: float = option(0.0, "Learning rate at which the warm-up begins.")
    lr_decay_iters: int | None = option(
        None, "Steps of warm-up and decay together, after which lr stays at min_lr; those of the run when not given."
    )
    lr_decay_style: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Decay of the learning rate from lr to min_lr after the warm-up."
    )
    weight_decay: float = option(0.0, "Decoupled weight decay; never on biases and norms.")
    adam_beta1: float = option(0.9, "Decay of AdamW's running mean of the gradient.")
    adam_beta2: float = option(0.999, "Decay of AdamW's running mean of the squared gradient.")
    adam_eps: float = option(1e-8, "Epsilon in AdamW's denominator.")
    clip_grad: float = option(1.0, "Maximum norm of the whole gradient; 0 disables clipping.")
    epochs: int | None = option(
        None, "Passes over the training pairs. 1 when neither these nor train_iters are given.", everyday=True
    )
    train_iters: int | None = option(
        None,
        "Optimizer steps. Beside epochs, the run ends at the earlier of both; a file's epochs give way to these on the "
        "command line, and the other way round.",
        everyday=True,
    )

    def __post_init__(self) -> None:
        if self.epochs is None and self.train_iters is None:
            object.__setattr__(self, "epochs", 1)
        require_positive(self, "lr", "adam_eps", "epochs", "train_iters", "lr_decay_iters")
        require((self.lr_warmup_iters or 0) >= 0, "lr_warmup_iters", self.lr_warmup_iters, "a number not below 0")
        require(0 <= self.lr_warmup_init <= self.lr, "lr_warmup_init", self.lr_warmup_init, f"from 0 to lr ({self.lr})")
        require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"a number from 0 to lr ({self.lr})")
        for key in ("lr_warmup_fraction", "adam_beta1", "adam_beta2"):
            found = getattr(self, key)
            require(0 <= found < 1, key, found, "a number from 0 up to, not including, 1")
        for key in ("weight_decay", "clip_grad"):
            found = getattr(self, key)
            require(0 <= found < math.inf, key, found, "a number not below 0")
