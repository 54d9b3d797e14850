"""The calls of a rank to its communicators, recorded while it runs alone over torch's fake backend.

The fake backend does nothing and never waits, so every rank of a layout runs in turn in one process. What a rank asks
does not depend on what it receives, shapes apart: those are filled in, as are ones for data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from nccl_rules import Call, Message, Program, Read, Synchronize, Wait
from torch.testing._internal.distributed.fake_pg import FakeStore

# What python calls of torch.distributed end in, by the operation of NCCL.
_COLLECTIVES = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "all_gather_single_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "reduce_scatter_single_coalesced": "reduce-scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
    "barrier": "barrier",
}
# The fake backend's work has, in newer versions of torch, a class of its own with a `wait` of its own.
_WORKS = {dist.Work, getattr(torch._C._distributed_c10d, "FakeWork", dist.Work)}
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")
_OURS = ("simpo_megatron/", "megatron/core/")


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a world over the fake backend."""
    from megatron.core import parallel_state

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    new_group = dist.new_group

    def without_gloo(*arguments: Any, **options: Any) -> Any:
        return new_group(*arguments, **{**options, "backend": None})

    try:
        with mock.patch.object(dist, "new_group", without_gloo):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class Recorder:
    """The program of the rank that runs while it is active."""

    def __init__(self, rank: int, shape: tuple[int, ...]) -> None:
        self.rank, self.shape = rank, shape
        self.program: Program = []
        self._calls: dict[int, Call] = {}
        self._works: list[Any] = []
        self._batch: Call | None = None
        self._is_inside = False
        self._num_messages = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hooks on torch.distributed and on what makes the host wait, while this lasts."""
        with ExitStack() as hooks:
            for name in ("send", "recv", *_COLLECTIVES):
                if hasattr(dist.ProcessGroup, name):
                    hooks.enter_context(mock.patch.object(dist.ProcessGroup, name, self._issued(name)))
            for kind in _WORKS:
                hooks.enter_context(mock.patch.object(kind, "wait", self._waited(kind)))
            batched = self._batched(c10d.batch_isend_irecv)
            for module in (dist, c10d):
                hooks.enter_context(mock.patch.object(module, "batch_isend_irecv", batched))
            synchronized = lambda *_: self.program.append(Synchronize(_caller()))  # noqa: E731
            hooks.enter_context(mock.patch.object(torch.cuda, "synchronize", synchronized))
            for name in _READS:
                hooks.enter_context(mock.patch.object(torch.Tensor, name, self._read(name)))
            yield

    def _issued(self, name: str) -> Any:
        original = getattr(dist.ProcessGroup, name)

        def method(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            if self._is_inside:  # an overload that ends in another one
                return original(group, *arguments, **options)
            call = self._note(group, name, arguments, options)
            self._is_inside = True
            try:
                work = original(group, *arguments, **options)
            finally:
                self._is_inside = False
            if call is not None and work is not None:
                # Kept, so that no other work gets its address.
                self._works.append(work)
                self._calls[id(work)] = call
            return work

        return method

    def _note(self, group: dist.ProcessGroup, name: str, arguments: tuple, options: dict) -> Call | None:
        members = tuple(dist.get_process_group_ranks(group))
        if name in _COLLECTIVES:
            if len(members) == 1:
                return None
            kind = _COLLECTIVES[name]
            # Of these each rank has its own sizes.
            is_uneven = kind in ("all-to-all", "gather", "scatter")
            num_bytes = 0 if is_uneven else max([_num_bytes(argument) for argument in arguments[:2]], default=0)
            call = Call(self.rank, group.group_name, members, kind, num_bytes, where=_caller())
            self.program.append(call)
            return call
        tensors, peer = arguments[0], arguments[1]
        if name == "recv":
            self._fill(tensors)
        self._num_messages += 1
        message = Message(name == "send", members[peer], _num_bytes(tensors), self._num_messages)
        call = self._batch or Call(self.rank, group.group_name, members, "message", where=_caller())
        if not call.messages:
            call.group, call.members = group.group_name, members
            self.program.append(call)
        call.messages.append(message)
        return call

    def _fill(self, tensors: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(torch.tensor(self.shape)) if tensor.dtype == torch.int64 else tensor.fill_(1)

    def _batched(self, original: Any) -> Any:
        def batch(operations: list) -> Any:
            call = self._batch = Call(self.rank, "", (), "batch", where=_caller())
            try:
                works = original(operations)
            finally:
                self._batch = None
            # A backend that coalesces gives one work for all of them.
            self._works += works
            self._calls |= {id(work): call for work in works}
            return works

        return batch

    def _waited(self, kind: type) -> Any:
        original = kind.wait

        def wait(work: Any, *arguments: Any) -> Any:
            if id(work) in self._calls:
                self.program.append(Wait(self._calls[id(work)]))
            return original(work, *arguments)

        return wait

    def _read(self, name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            if any(part in caller for part in _OURS):
                self.program.append(Read(_caller()))
            return original(tensor, *arguments, **options)

        return read


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _caller() -> str:
    """The nearest line of ours or megatron's above."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in _OURS):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
