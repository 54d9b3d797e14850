"""Signals that stop a run: the first is noted, and all ranks stop together after a whole step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from simpo_megatron.errors import status_line

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGINT is Ctrl-C and a notebook's interrupt; SIGTERM is what torchrun, Kubernetes and Slurm send; SIGUSR1 is what
Slurm's `--signal=USR1@300` sends ahead of it."""


_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignals:
    """While the context lasts, the first of STOP_SIGNALS is noted instead of ending the process.

    With the first one the handlers that were there before are back, so a second one acts as it always would: it ends
    the process at once, also inside a collective. They are back in any case when the context ends. Python allows
    handlers in the main thread only.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._previous: dict[signal.Signals, _Handler] = {}

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
        name = signal.Signals(number).name
        text = f"{name} received; stopping after this step (a second signal ends the process at once)"
        # Not print: the signal may have come while the same buffer was being written.
        os.write(2, (status_line("STOPPING", text, dist.get_rank()) + "\n").encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
