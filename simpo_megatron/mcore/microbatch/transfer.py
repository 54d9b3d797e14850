"""One copy to the device for all the small tensors of a microbatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes: the alignment of a tensor in the buffer, for any dtype and the widest loads of a kernel.
_ALIGNMENT = 16


def copied_together(tensors: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """CPU tensors on `device`: views of one buffer, which goes there in one copy; None stays None.

    The copy to a GPU is asynchronous, from pinned memory that torch reuses only after the copy has finished. The views
    share a version counter: none may be changed in place while autograd has saved another.
    """
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += 0 if tensor is None else -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, tensors, strict=True):
        if tensor is not None:
            _view(buffer, start, tensor).copy_(tensor)
    buffer = buffer.to(device, non_blocking=True)
    return [
        None if tensor is None else _view(buffer, start, tensor) for start, tensor in zip(starts, tensors, strict=True)
    ]


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
