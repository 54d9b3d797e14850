"""Fault injection: tests use it to prove what a run does when something goes wrong.

`SIMPO_FAULT=point:rank:action` makes the rank do the action when it first reaches the point, `point@n` the nth time:
`SIMPO_FAULT=step@3:1:sigterm` sends rank 1 a SIGTERM when its third step starts.

Points: `data` (before the pairs of a pass are read, on the rank that reads for its tensor-parallel group), `forward`
(a microbatch has gone through this rank's stage), `backward` (its gradient has come back), `update` (before the
optimizer changes the weights), `step` (a training step starts), `save` (before this rank writes its share of a
checkpoint).

Actions: `raise` an error, `nan` (the value becomes NaN; `forward` and `backward` only), `hang` for ever, `exit` at once
with exit code 0, `kill` (SIGKILL, as the kernel does when memory runs out), `stop` (SIGSTOP: the process exists but
does nothing), `sigterm` (the rank sends itself a SIGTERM and goes on).

The variable is read once, when a run starts. Without it this module does nothing.
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
    """The error of the action `raise`: stands for an unexpected error."""


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
    """Pass a point where nothing is computed."""
    if _fault is not None:
        _arrive(_fault, point)


def at_value(point: str, value: Tensor) -> Tensor:
    """`value`, or NaN when this rank's fault asks for it."""
    return value * float("nan") if _fault is not None and _arrive(_fault, point) else value


def at_gradient(point: str, value: Tensor) -> Tensor:
    """`value`; its gradient's hook passes the point in the backward."""
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
    """True when the value must become NaN; does the other actions of this rank's fault."""
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
