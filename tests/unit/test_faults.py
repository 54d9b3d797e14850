"""The fault hook does what it says, to the rank and at the arrival it names, and nothing when nobody asks."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from simpo_megatron import faults
from simpo_megatron.errors import ConfigError


@pytest.fixture
def arm(monkeypatch):
    def armed(text, rank=0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("SIMPO_FAULT", text)
        faults.arm()

    yield armed
    monkeypatch.delenv("SIMPO_FAULT", raising=False)
    faults.arm()


def test_without_the_variable_every_point_hands_back_what_it_got(monkeypatch):
    monkeypatch.delenv("SIMPO_FAULT", raising=False)
    faults.arm()
    value = torch.ones(2)
    assert all(faults.at(point) is None and faults.at_value(point, value) is value for point in faults.POINTS)
    value.requires_grad_()
    assert faults.at_gradient("backward", value) is value and not value._backward_hooks


def test_every_point_is_one_that_the_package_passes():
    sources = [path.read_text() for path in Path(faults.__file__).parent.rglob("*.py")]
    passed = {point for text in sources for point in re.findall(r'faults\.at(?:_gradient|_value)?\("(\w+)"', text)}
    assert passed == set(faults.POINTS)
    assert all(f"`{word}`" in faults.__doc__ for word in faults.POINTS + faults.ACTIONS)


def test_it_is_documented_in_one_place_and_read_in_one():
    sources = {path: path.read_text() for path in Path(faults.__file__).parent.rglob("*.py")}
    assert [path.name for path, text in sources.items() if "SIMPO_FAULT" in text] == ["faults.py"]


def test_it_happens_once_at_the_arrival_that_is_named(arm):
    arm("step@2:0:raise")
    faults.at("step")
    faults.at("data")
    with pytest.raises(faults.InjectedError, match="injected at step"):
        faults.at("step")
    faults.at("step")


def test_other_ranks_are_left_alone(arm):
    arm("step:1:raise", rank=0)
    faults.at("step")


def test_nan_spoils_the_value_and_leaves_it_differentiable(arm):
    arm("forward:0:nan")
    value = torch.ones(2, requires_grad=True)
    spoilt = faults.at_value("forward", value)
    assert spoilt.isnan().all() and spoilt.requires_grad


def test_backward_spoils_the_gradient_and_not_the_value(arm):
    arm("backward:0:nan")
    weight = torch.ones(2, requires_grad=True)
    value = faults.at_gradient("backward", 3 * weight)
    assert value.tolist() == [3, 3]
    value.sum().backward()
    assert weight.grad.isnan().all()
    assert faults.at_gradient("backward", torch.ones(2)).tolist() == [1, 1], "without gradients there is no backward"


@pytest.mark.parametrize(("action", "number"), faults._SIGNALS.items())
def test_a_signal_goes_to_the_rank_itself(action, number, arm, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda process, signal: sent.append((process, signal)))
    arm(f"update:0:{action}")
    faults.at("update")
    assert sent == [(os.getpid(), number)]


def test_sigterm_reaches_the_handler_and_the_rank_goes_on(arm):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(os.getpid()))
    try:
        arm("save:0:sigterm")
        faults.at("save")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [os.getpid()]


@pytest.mark.parametrize(
    "text", ["", "step", "step:0", "step:x:raise", "step:0:explode", "sleep:0:raise", "step@0:0:raise", "step:0:nan"]
)
def test_a_fault_that_does_not_exist_is_refused_in_one_line(arm, text):
    with pytest.raises(ConfigError, match=r"^SIMPO_FAULT: found .*expected point:rank:action.*data, forward, backward"):
        arm(text)
