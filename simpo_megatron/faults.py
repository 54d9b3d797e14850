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
from typing import TYPE_CHECKING, TypeVar

from simpo_megatron.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

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


class InjectedError(RuntimeError):
    """What the action `raise` raises: an error that nobody foresaw."""


_fault: _Fault | None = None


def arm() -> None:
    """Read the variable.

    Raises:
        ConfigError: it names no such fault.
    """
    global _fault
    text = os.environ.get("SIMPO_FAULT")
    _fault = None if text is None else _parse(text)


def at(point: str, value: Value = None) -> Value:
    """`value`, unless the fault of this rank says otherwise."""
    return value if _fault is None else _arrive(_fault, point, value)


def at_gradient(point: str, value: Tensor) -> Tensor:
    """`value`; the fault of this rank arrives at the point when its gradient is there."""
    if _fault is not None and value.requires_grad:
        value.register_hook(lambda gradient: at(point, gradient))
    return value


def _parse(text: str) -> _Fault:
    try:
        place, rank, action = text.split(":")
        point, _, nth = place.partition("@")
        fault = _Fault(point, int(nth or 1), int(rank), action)
    except ValueError:
        fault = None
    known = fault is not None and fault.point in POINTS and action in ACTIONS and fault.nth > 0
    if not known or (action == "nan" and fault.point not in _COMPUTES):
        raise ConfigError(
            f"SIMPO_FAULT: found {text!r}, expected point:rank:action with a point of {', '.join(POINTS)} and an "
            f"action of {', '.join(ACTIONS)} (nan at forward and backward only); unset it for a real run"
        )
    return fault


def _arrive(fault: _Fault, point: str, value: Value) -> Value:
    if point != fault.point or int(os.environ.get("RANK", 0)) != fault.rank:
        return value
    fault.num_arrivals += 1
    if fault.num_arrivals != fault.nth:
        return value
    if fault.action == "raise":
        raise InjectedError(f"injected at {point} by SIMPO_FAULT")
    if fault.action == "nan":
        return value * float("nan")
    if fault.action == "hang":
        while True:
            time.sleep(1)
    if fault.action == "exit":
        os._exit(0)
    os.kill(os.getpid(), _SIGNALS[fault.action])
    return value
