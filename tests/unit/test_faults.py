"""The fault hook does what it says, to the rank and at the arrival it names, and nothing when nobody asks."""

from __future__ import annotations

import os
import signal

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
    assert all(faults.at(point, value) is value for point in faults.POINTS)


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
    spoilt = faults.at("forward", value)
    assert spoilt.isnan().all() and spoilt.requires_grad


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
    with pytest.raises(ConfigError, match=r"^SIMPO_FAULT: found .*expected point:rank:action.*data, forward, step"):
        arm(text)
