"""What keeps ranks together: a problem of one is raised on all, and a signal to one stops all after a whole step."""

from __future__ import annotations

import os
import signal
from collections import Counter
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from simpo_megatron.errors import ParallelError, SimPOError, listed
from simpo_megatron.mcore import device

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGINT is Ctrl-C and a notebook's interrupt; SIGTERM is what torchrun, Kubernetes and Slurm send; SIGUSR1 is what
Slurm's `--signal=USR1@300` sends ahead of it."""

_MAX_SHOWN = 8


def agree(problem: SimPOError | None, number: int = 0, *, same: int = 0) -> int:
    """The largest `number` of any rank, when no rank has a problem.

    Called by every rank where one may fail alone, before a collective in which its peers would wait for it.

    Args:
        same: what must be the same on every rank, as a number of at most 62 bits.

    Collectives: one all-reduce of 32 bytes, world; when a rank has a problem, one object gather.

    Raises:
        SimPOError: on every rank alike, the problem of the first rank that has one of its own, and which rank it is.
        ParallelError: on every rank alike, when `same` is not, with the ranks that differ from most.
    """
    # Integers: a MAX over floats may lose a NaN.
    word = torch.tensor([problem is not None, number, same, -same], dtype=torch.int64, device=device.current_device())
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    failed, largest, highest, lowest = word.tolist()
    if not failed and highest == -lowest:
        return largest
    if not failed:
        raise _disagreement(same)
    problems: list[SimPOError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    # A rank that heard of a failure from a peer of its group has nothing of its own to say.
    told = sorted(
        (isinstance(heard, ParallelError), rank, heard) for rank, heard in enumerate(problems) if heard is not None
    )
    _, rank, first = told[0]
    error = type(first)(f"{first} (rank {rank})")
    error.exit_code = first.exit_code
    raise error from problem


def _disagreement(same: int) -> ParallelError:
    every = [0] * dist.get_world_size()
    dist.all_gather_object(every, same)
    ((most, _),) = Counter(every).most_common(1)
    others = [rank for rank, value in enumerate(every) if value != most]
    return ParallelError(
        f"ranks planned different work for this step: the pairs or microbatches of {listed(others, _MAX_SHOWN)} are "
        f"not those of the other ranks (of {len(every)}); start again from the last checkpoint, and report it"
    )


class StopSignals:
    """While the context lasts, the first of STOP_SIGNALS is noted instead of ending the process.

    With the first one the handlers that were there before are back, so a second one acts as it always would: it ends
    the process at once, also inside a collective. They are back in any case when the context ends. Python allows
    handlers in the main thread only.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def noted(self) -> int:
        """The number of the signal that this rank has noted; 0 when none has come."""
        return self._noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        self._restore()
        line = (
            f"simpo_megatron rank {dist.get_rank()}: {signal.Signals(number).name} received; stopping after this step "
            "(a second signal ends the process at once)\n"
        )
        # Not print: the signal may have come while the same buffer was being written.
        os.write(2, line.encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
