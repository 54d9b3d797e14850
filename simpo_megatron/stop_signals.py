"""Stop signals: during training the run stops after a whole step, before and after training at once.

Imports neither torch nor megatron, so that signals are handled while they are imported.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from simpo_megatron.errors import StoppedBySignal, report_error, status_line

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGINT is Ctrl-C and a notebook's interrupt; SIGTERM is what torchrun, Kubernetes and Slurm send; SIGHUP comes when a
terminal closes; SIGUSR1 is what Slurm's `--signal=USR1@300` sends ahead of its SIGTERM."""

SAME_REQUEST_SECONDS = 10.0
"""Schedulers send SIGTERM twice within moments: what follows the first within this time asks for the same."""

_UNWIND_SECONDS = 5.0

_Handler = Callable[[int, FrameType | None], Any] | int | None

current: StopSignals | None = None
"""The innermost context that is open."""


class StopSignals:
    """While the context lasts, the first of STOP_SIGNALS asks the run to stop instead of ending the process.

    At first it raises StoppedBySignal in the main thread. If that thread waits in a library that Python cannot
    interrupt, `on_stuck` is called after five seconds, from another thread. Between `note_from_now_on` and
    `raise_from_now_on` the signal is only noted. A later signal ends the process at once, also inside a collective:
    SIGINT always, another one only if it comes ten seconds after the first.

    When the context ends, earlier handlers are restored. Inside another such context, that of a command whose process
    is about to end, signals are ignored instead. Python allows handlers in the main thread only.
    """

    def __init__(self) -> None:
        self.describe_end: Callable[[], str] = lambda: "stopped before the run began; the same command continues it"
        """A sentence on how to continue a run that a signal ends now."""
        self.on_stuck: Callable[[StoppedBySignal], int] = report_error
        """The exit code, once the stop was told."""
        self._noted, self._mode = 0, "raise"
        self._heard_at: float | None = None
        self._is_over = threading.Event()
        self._previous: dict[signal.Signals, _Handler] = {}
        self._outer: StopSignals | None = None

    def __enter__(self) -> StopSignals:
        global current
        self._outer, current = current, self
        if self._outer is not None and self._outer._noted:
            # The exception was raised inside an import that swallowed it.
            raise self._stopped(self._outer._noted)
        self._heard, writes = socket.socketpair()
        writes.setblocking(False)
        self._writes = writes
        # nohup: SIGHUP stays ignored.
        asked = [n for n in STOP_SIGNALS if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
        self._previous = {number: signal.signal(number, self._handle) for number in asked}
        self._previous_descriptor = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global current
        current = self._outer
        self._is_over.set()
        signal.set_wakeup_fd(self._previous_descriptor, warn_on_full_buffer=False)
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._outer is not None:
            ignore_from_now_on()
        self._writes.close()

    def note_from_now_on(self) -> None:
        """Only note a signal from here on; the run asks for it after each step."""
        self._mode = "note"

    def raise_from_now_on(self) -> None:
        """Raise StoppedBySignal at a signal from here on, and now when one was noted since the last step."""
        self._mode = "raise"
        if self._noted:
            raise self._stopped(self._noted)

    def ignore_from_now_on(self) -> None:
        """Ignore signals from here on: the run is ending."""
        self._mode = "ignore"

    def noted(self) -> int:
        """The number of the signal that this rank has noted; 0 when none has come."""
        return self._noted

    def _stopped(self, number: int) -> StoppedBySignal:
        return StoppedBySignal(f"{signal.Signals(number).name}: {self.describe_end()}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self._noted = not self._noted, self._noted or number
        if self._mode == "raise" and is_first:
            raise self._stopped(number)

    def _listen(self) -> None:
        """Wait for signals on a socket, which gets a byte at once; Python delays handlers to its next instruction."""
        with self._heard:
            while byte := self._heard.recv(1):
                if byte[0] in STOP_SIGNALS:
                    self._hear(byte[0])

    def _hear(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._mode == "ignore":
            return
        if self._heard_at is None:
            self._heard_at = now
            if self._mode == "raise":
                threading.Thread(target=self._end_if_stuck, args=(number,), daemon=True).start()
            else:
                _write("STOPPING", f"{name} received; stopping after this step (a second signal ends the process)")
        elif number == signal.SIGINT or now - self._heard_at > SAME_REQUEST_SECONDS:
            _write("STOPPED", f"{name}, the second signal: ended at once; {self.describe_end()}")
            os._exit(128 + number)

    def _end_if_stuck(self, number: int) -> None:
        if not self._is_over.wait(_UNWIND_SECONDS):
            os._exit(self.on_stuck(self._stopped(number)))


def ignore_from_now_on() -> None:
    """Ignore STOP_SIGNALS in a process that is about to end, so that its exit code stands."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _write(kind: str, text: str) -> None:
    # Not print: another thread may be writing the same buffer.
    line = status_line(kind, text, int(os.environ.get("RANK", 0)))
    # The terminal is closed: nobody reads this.
    with suppress(OSError):
        os.write(2, (line + "\n").encode())
