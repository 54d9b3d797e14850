"""A run that is not told when to save does so six times, and after half an hour."""

from __future__ import annotations

import signal

import pytest

from simpo_megatron.training.saving import SaveSchedule


class Signals:
    number = 0

    def noted(self):
        return self.number


@pytest.mark.parametrize(("interval", "num_steps", "due"), [
    (None, 96, [16, 32, 48, 64, 80, 96]),
    (None, 7, [2, 4, 6]),
    (None, 3, [1, 2, 3]),
    (40, 96, [40, 80]),
])  # fmt: skip
def test_steps_after_which_a_checkpoint_is_due(interval, num_steps, due):
    schedule = SaveSchedule(interval, num_steps)
    assert [step for step in range(1, num_steps + 1) if schedule.at(step, 0)] == due


def test_half_an_hour_counts_by_the_first_rank_alone_and_a_signal_is_not_lost_beside_it(monkeypatch):
    now, rank, signals = [0.0], [0], Signals()
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank[0])
    schedule = SaveSchedule(None, 10**6, clock=lambda: now[0])
    told = schedule.asked_with(signals)
    assert told() == 0
    now[0] = 1801.0
    assert schedule.at(5, told()) and schedule.signal_in(told()) == 0
    rank[0] = 1
    assert told() == 0
    # Ranks agree on the largest of what they tell: a signal, of whatever number, is above a checkpoint that is due.
    signals.number = signal.SIGHUP
    assert schedule.signal_in(max(told(), 1)) == signal.SIGHUP
    rank[0], signals.number = 0, 0
    schedule.restart_clock()
    assert told() == 0


def test_an_interval_that_was_given_needs_no_clock(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    now = [0.0]
    schedule = SaveSchedule(50, 100, clock=lambda: now[0])
    now[0] = 1e6
    assert schedule.asked_with(Signals())() == 0
