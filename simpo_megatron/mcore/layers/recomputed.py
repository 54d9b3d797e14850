"""Outputs of cheap operations that the backward computes again, where a layer would keep them for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NAME = "_recipe"


class _Kept(NamedTuple):
    """A tensor and its version, as autograd itself keeps them."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        # Detached, for a node that held its own output would never be freed.
        return cls(tensor.detach(), tensor._version)

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(f"a tensor that the backward needs was changed in place: {tuple(self.tensor.shape)}")
        return self.tensor


class _Recipe(NamedTuple):
    """A function and its arguments, whose result an output was in this version; and a shape that it is kept in."""

    function: Callable[..., Tensor]
    arguments: tuple[_Kept, ...]
    version: int
    shape: torch.Size

    def get(self) -> Tensor:
        return self.function(*(kept.get() for kept in self.arguments)).view(self.shape)


def computed_by(output: Tensor, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """`output`, marked as function(*arguments), to the last bit.

    Layers under `recomputing` then keep `arguments` in its place, which should be tensors that are kept anyway.
    """
    if torch.is_grad_enabled():
        setattr(output, _NAME, _Recipe(function, tuple(map(_Kept.of, arguments)), output._version, output.shape))
    return output


def recomputing() -> torch.autograd.graph.saved_tensors_hooks:
    """The context in which autograd keeps no marked output; each backward that reads one computes it again."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, lambda packed: packed.get())


def _pack(tensor: Tensor) -> _Kept | _Recipe:
    # Functions make views: megatron's copy to tensor-parallel ranks of its whole input, torch's linear of rows.
    for owner in (tensor, tensor._base):
        recipe = getattr(owner, _NAME, None)
        if owner is not None and recipe is not None and recipe.version == owner._version and _is_whole(tensor, owner):
            return recipe._replace(shape=tensor.shape)
    return _Kept.of(tensor)


def _is_whole(view: Tensor, owner: Tensor) -> bool:
    """True where both have the same elements in the same order."""
    return view.numel() == owner.numel() and view.is_contiguous() and owner.is_contiguous()
