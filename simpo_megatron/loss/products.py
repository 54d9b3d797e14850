"""Matrix products of bf16 inputs with fp32 outputs, in whichever form the installed torch offers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def has_wide_products() -> bool:
    """Returns whether torch can write a product of bf16 matrices in fp32 on a GPU, and add it to fp32.

    Before 2.10 its kernel refuses to add to fp32, which its shapes on the meta device do not tell (pytorch #167931).
    """
    if torch.__version__ < "2.10":
        return False
    empty = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    wide = empty.float()
    try:
        torch.mm(empty, empty, out_dtype=torch.float32, out=wide)
        torch.addmm(wide, empty, empty, out_dtype=torch.float32, out=wide)
    except (TypeError, RuntimeError):
        return False
    return True


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Returns `out`, which becomes left @ right, rounded to its dtype once where the device can."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if left.device.type != "cpu" and has_wide_products():
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns `total`, to which left @ right is added; the sum is rounded once where torch can."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    if left.device.type == "cpu":
        return total.addmm_(left.to(total.dtype), right.to(total.dtype))
    if has_wide_products():
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.add_(torch.mm(left, right))
