"""Faults on demand, so that tests can prove what happens when something goes wrong.

`SIMPO_FAULT=point:rank:action` makes the rank do the action at its first arrival at the point, `point@n` at its nth:
`SIMPO_FAULT=step@3:1:sigterm` sends rank 1 a SIGTERM when its third step starts.

Points: `data` (the pairs of a pass are about to be read, by the rank that reads for its tensor-parallel group),
`forward` (a microbatch has gone through this rank's stage), `backward` (the gradient of what went through comes back),
`update` (the optimizer is about to change the weights), `step` (a training step starts), `save` (this rank is about to
write its share of a checkpoint).

Actions: `raise` an error, `nan` (what is computed there is not a number; `forward` and `backward` only), `hang` for
ever, `exit` at once with exit code 0, `kill` (SIGKILL, as when memory runs out), `stop` (SIGSTOP: the process is there
and does nothing), `sigterm` (the rank sends itself a SIGTERM and goes on).

Without the variable, which is read once, when a run starts, nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpo_megatron.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "SIMPO_FAULT"
POINTS = ("data", "forward", "backward", "update", "step", "save")
ACTIONS = ("raise", "nan", "hang", "exit", "kill", "stop", "sigterm")
_COMPUTES = ("forward", "backward")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "sigterm": signal.SIGTERM}


@dataclass
class _Fault:
    point: str
    nth: int
    rank: int
    action: str
    num_arrivals: int = 0

    @property
    def is_known(self) -> bool:
        known = self.point in POINTS and self.action in ACTIONS and self.nth > 0
        return known and (self.action != "nan" or self.point in _COMPUTES)


class InjectedError(RuntimeError):
    """The error of the action `raise`: one that nobody foresaw."""


_fault: _Fault | None = None


def arm() -> None:
    """Read the variable.

    Raises:
        ConfigError: it names no such fault.
    """
    global _fault
    text = os.environ.get(VARIABLE)
    _fault = None if text is None else _parse(text)


def at(point: str) -> None:
    """Arrive at a point where nothing is computed."""
    if _fault is not None:
        _arrive(_fault, point)


def at_value(point: str, value: Tensor) -> Tensor:
    """`value`, or not a number when the fault of this rank says so."""
    return value * float("nan") if _fault is not None and _arrive(_fault, point) else value


def at_gradient(point: str, value: Tensor) -> Tensor:
    """`value`; the fault of this rank arrives at the point when its gradient is there."""
    if _fault is not None and value.requires_grad:
        value.register_hook(lambda gradient: at_value(point, gradient))
    return value


def _parse(text: str) -> _Fault:
    try:
        place, rank, action = text.split(":")
        point, _, nth = place.partition("@")
        fault = _Fault(point, int(nth or 1), int(rank), action)
    except ValueError:
        fault = None
    if fault is None or not fault.is_known:
        raise ConfigError(
            f"SIMPO_FAULT: found {text!r}, expected point:rank:action with a point of {', '.join(POINTS)} and an "
            f"action of {', '.join(ACTIONS)} (nan at forward and backward only); unset it for a real run"
        )
    return fault


def _arrive(fault: _Fault, point: str) -> bool:
    """True when the value computed here is to be no number; other actions of this rank's fault are done here."""
    if point != fault.point or int(os.environ.get("RANK", 0)) != fault.rank:
        return False
    fault.num_arrivals += 1
    if fault.num_arrivals != fault.nth:
        return False
    if fault.action == "raise":
        raise InjectedError(f"injected at {point} by SIMPO_FAULT")
    if fault.action == "nan":
        return True
    if fault.action == "hang":
        while True:
            time.sleep(1)
    if fault.action == "exit":
        os._exit(0)
    os.kill(os.getpid(), _SIGNALS[fault.action])
    return False
