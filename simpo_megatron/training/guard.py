"""What keeps a run from losing work when its machines are taken away: signals that ask it to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from simpo_megatron.mcore import device

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM is what torchrun, Kubernetes and Slurm send; SIGUSR1 what Slurm's `--signal=USR1@300` sends ahead of it."""


class StopSignals:
    """While the context lasts, the first SIGTERM or SIGUSR1 is noted instead of ending the process.

    With the first one the handlers that were there before are back, so a second one acts as it always would: it ends
    the process at once, also inside a collective. They are back in any case when the context ends. Python allows
    handlers in the main thread only.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._process = os.getpid()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self) -> signal.Signals | None:
        """The signal that a rank has noted, the same on every rank; None when none has.

        Collectives: one all-reduce of 4 bytes, world.
        """
        noted = torch.tensor(self._noted, dtype=torch.int32, device=device.current_device())
        dist.all_reduce(noted, op=dist.ReduceOp.MAX)
        return signal.Signals(int(noted)) if noted else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A process group was told, and this is a checkpoint's forked writer: what it writes is to be whole.
            return
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
