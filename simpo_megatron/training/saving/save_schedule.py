"""The steps at which a run saves, if `save_interval` is not given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch.distributed as dist

from simpo_megatron.stop_signals import StopSignals


class SaveSchedule:
    """The steps after which a checkpoint is due: every `interval`th or, when that is None, six in a run of `num_steps`.

    If those are more than half an hour apart, one is also due after half an hour by rank 0's clock.
    """

    _SECONDS = 1800.0
    _DUE = 1
    """Below every signal: a run that stops saves anyway."""

    def __init__(self, interval: int | None, num_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._by_clock, self._interval, self._clock = interval is None, interval or math.ceil(num_steps / 6), clock
        self.restart_clock()

    def restart_clock(self) -> None:
        self._saved_at = self._clock()

    def asked_with(self, signals: StopSignals) -> Callable[[], int]:
        """A function called at the end of a step: returns this rank's signal, or that a save is due, or 0."""

        def note() -> int:
            late = self._by_clock and dist.get_rank() == 0 and self._clock() - self._saved_at > self._SECONDS
            return signals.noted() + self._DUE if signals.noted() else self._DUE * late

        return note

    def signal_in(self, noted: int) -> int:
        """The signal in the value that the ranks agreed on, 0 for none."""
        return max(0, noted - self._DUE)

    def at(self, iteration: int, noted: int) -> bool:
        return iteration % self._interval == 0 or noted == self._DUE
