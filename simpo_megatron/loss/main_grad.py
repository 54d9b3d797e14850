"""Megatron's protocol for weight gradients that a backward adds to `main_grad` itself."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_already_added(weight: Tensor) -> Tensor | None:
    """Returns the placeholder that autograd gets once the gradient is in `weight.main_grad`, and marks it as added.

    DDP's hooks expect some gradient. They read it only where `zero_out_wgrad` is set, because other uses of the
    weight (a tied embedding) add to it; elsewhere it is left uninitialised.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)
