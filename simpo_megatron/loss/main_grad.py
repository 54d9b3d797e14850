"""Megatron's protocol for weight gradients that a backward adds to `main_grad` itself."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_already_added(weight: Tensor) -> Tensor | None:
    """Returns what autograd is to see once the gradient of `weight` is in `weight.main_grad`; marks it as added.

    DDP's hooks want a gradient to be there. They read it only where `zero_out_wgrad` says that other uses of the
    weight (a tied embedding) may be added to it, so elsewhere nobody fills it.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)
