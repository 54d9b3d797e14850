"""Counts of bytes and multiplications on a GPU, from operations on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that launch nothing: views, and memory that is only allocated.
NO_KERNEL = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
COLLECTIVE = "c10d."
"""The beginning of a collective's name; its bytes are about those that a rank sends, by a ring."""
_ONLY_WRITES = {"zero_", "fill_", "zeros", "zeros_like", "full", "full_like", "ones", "new_zeros", "new_full"}


class Operation(NamedTuple):
    """One launch: bytes read and written, and multiplications and additions of a matrix product, else 0."""

    name: str
    num_bytes: int
    flops: int
    largest: tuple[int, ...]
    """The shape of its largest tensor."""


@contextmanager
def norms_of_a_gpu() -> Iterator[None]:
    """While the context lasts, the meta device has a kernel of RMSNorm as CUDA has, and autograd's formula for it.

    Elsewhere torch makes the norm of other operations. torch.library refuses to register such a kernel, for a program
    would see another graph than it runs; here the one that a GPU runs is to be seen.
    """

    def fused(rows: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
        kept = rows.shape[: rows.dim() - len(shape)]
        return torch.empty_like(rows), rows.new_empty([*kept, *[1] * len(shape)], dtype=torch.float32)

    library = torch.library.Library("aten", "IMPL")
    library.m.impl("_fused_rms_norm", "Meta", fused, False)
    try:
        yield
    finally:
        library._destroy()


class Counter(TorchDispatchMode):
    """Records every operation on tensors of the meta device that launches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._is_in_one = False

    def as_one(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what `function` does, and counts it as one launch, as a compiler makes one of elementwise work."""
        if self._is_in_one:
            return function(*args, **kwargs)
        self._is_in_one = True
        try:
            result = function(*args, **kwargs)
        finally:
            self._is_in_one = False
        touched = [*_meta((args, kwargs)), *_meta(result)]
        if touched:
            largest = max(touched, key=lambda x: x.numel())
            self.operations.append(
                Operation(function.__name__, sum(x.nbytes for x in touched), 0, tuple(largest.shape))
            )
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_in_one:
            return result
        name = func.__name__.split(".")[0]
        inputs, outputs = list(_meta((args, kwargs))), list(_meta(result))
        if name not in NO_KERNEL and (inputs or outputs):
            counted = _sent(name, inputs + outputs) if func.namespace == "c10d" else None
            self.operations.append(counted or _counted(func, name, inputs, outputs, kwargs))
        return result


def _meta(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "meta")


def _sent(name: str, tensors: list[Tensor]) -> Operation:
    """The whole tensor, of which a rank has or gets a part; a sum that all get passes round twice."""
    whole = max(tensors, key=lambda x: x.nbytes)
    return Operation(COLLECTIVE + name, whole.nbytes * (2 if "allreduce" in name else 1), 0, tuple(whole.shape))


def _counted(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor], kwargs: dict) -> Operation:
    written = list(outputs)
    schema = func._schema.arguments
    if not written:  # an operator that only changes its arguments
        named = dict(zip([argument.name for argument in schema], inputs))
        written = [named[a.name] for a in schema if a.alias_info and a.alias_info.is_write and a.name in named]
    reads = 0 if name in _ONLY_WRITES else sum(x.nbytes for x in inputs if x is not kwargs.get("out"))
    if name in {"copy_", "slopes"}:  # the tensor written to is among the inputs, and is not read
        reads -= written[0].nbytes
    if name in {"index", "index_select"}:
        reads = outputs[0].nbytes
    flops = 0
    if name in _PRODUCTS:
        left, right = [x for x in inputs if x is not kwargs.get("out")][-2:]
        flops = 2 * left.numel() * right.shape[-1]
    if name in {"index_add_", "index_put_"}:
        size = inputs[-1].nbytes
        return Operation(name, 3 * size, 0, tuple(inputs[-1].shape))
    largest = max(inputs + outputs, key=lambda x: x.numel())
    return Operation(name, reads + sum(x.nbytes for x in written), flops, tuple(largest.shape))
