"""The player of calls: right orders run, and each kind of wrong one is found."""

from __future__ import annotations

import pytest
from nccl_rules import STRICTEST, Call, Message, Program, Read, Rules, Synchronize, Wait, faults

ALL, TWO = (0, 1, 2), (0, 1)
LAZY, EAGER = Rules(), Rules(eager=True)


def send(peer, num_bytes=8):
    return Call(-1, "all", ALL, "message", messages=[Message(True, peer, num_bytes)])


def receive(peer, num_bytes=8):
    return Call(-1, "all", ALL, "message", messages=[Message(False, peer, num_bytes)])


def batch(*calls):
    return Call(-1, "all", ALL, "batch", messages=[message for call in calls for message in call.messages])


def reduce(members, num_bytes=8, kind="all-reduce"):
    return Call(-1, "all" if members == ALL else "two", members, kind, num_bytes)


def made(*programs: Program) -> dict[int, Program]:
    """Programs of ranks 0, 1, 2: a number stands for a wait of the rank's call of that place."""
    done = {}
    for rank, program in enumerate(programs):
        for place, call in enumerate(program):
            if isinstance(call, int):
                program[place] = Wait(program[call])
            elif isinstance(call, Call):
                call.rank = rank
                for message in call.messages:
                    message.place = place
        done[rank] = program
    return done


RIGHT = {
    "to and fro": lambda: ([send(1), receive(1)], [receive(0), send(0)], []),
    "a batch whose group has met": lambda: (
        [reduce(ALL), batch(send(1), receive(1))],
        [reduce(ALL), batch(send(0), receive(0))],
        [reduce(ALL)],
    ),
    "two groups in one order": lambda: ([reduce(ALL), reduce(TWO)], [reduce(ALL), reduce(TWO)], [reduce(ALL)]),
}
WRONG = {
    "both send first": lambda: ([send(1), receive(1)], [send(0), receive(0)], []),
    "a receive without a send": lambda: ([receive(1)], [], []),
    "synchronize before the other may receive": lambda: (
        [send(1), Synchronize(), send(2)],
        [receive(2), receive(0)],
        [receive(0), send(1)],
    ),
    "a read of what the other sends after": lambda: (
        [receive(1), 0, Read(), send(1)],
        [receive(0), 0, Read(), send(0)],
        [],
    ),
    "two groups in opposite order, waited for": lambda: (
        [reduce(ALL), 0, Read(), reduce(TWO)],
        [reduce(TWO), 0, Read(), reduce(ALL)],
        [reduce(ALL)],
    ),
    "compute waits between two groups in opposite order": lambda: (
        [reduce(ALL), 0, reduce(TWO)],
        [reduce(TWO), 0, reduce(ALL)],
        [reduce(ALL)],
    ),
    "other collectives": lambda: ([reduce(TWO)], [reduce(TWO, kind="broadcast")], []),
    "other sizes": lambda: ([reduce(TWO, 8)], [reduce(TWO, 16)], []),
    "two lengths exchanged": lambda: ([send(1, 8), send(1, 16)], [receive(0, 16), receive(0, 8)], []),
    "a rank that leaves one out": lambda: ([reduce(TWO), reduce(TWO)], [reduce(TWO)], []),
}
# Only where communicators are made at their first use.
WRONG_LAZILY = {
    "made around a ring": lambda: ([send(1), receive(2)], [send(2), receive(0)], [send(0), receive(1)]),
    "made in opposite order": lambda: ([reduce(ALL), reduce(TWO)], [reduce(TWO), reduce(ALL)], [reduce(ALL)]),
    "a batch that one of the group never joins": lambda: (
        [batch(send(1), receive(1))],
        [batch(send(0), receive(0))],
        [],
    ),
    "a batch meets a message alone": lambda: (
        [reduce(ALL), send(1), batch(send(1))],
        [reduce(ALL), batch(receive(0)), receive(0)],
        [reduce(ALL)],
    ),
}


@pytest.mark.parametrize("programs", RIGHT.values(), ids=RIGHT)
@pytest.mark.parametrize("rules", [LAZY, EAGER, *STRICTEST], ids=["lazy", "eager", "strict, lazy", "strict, eager"])
def test_a_right_order_runs(programs, rules):
    assert faults(made(*programs()), rules) == []


@pytest.mark.parametrize("programs", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("rules", [LAZY, EAGER, *STRICTEST], ids=["lazy", "eager", "strict, lazy", "strict, eager"])
def test_a_wrong_order_is_found(programs, rules):
    assert faults(made(*programs()), rules)


@pytest.mark.parametrize("programs", WRONG_LAZILY.values(), ids=WRONG_LAZILY)
def test_an_order_that_is_wrong_for_communicators_made_at_first_use_is_found(programs):
    assert faults(made(*programs()), LAZY)


def test_one_queue_holds_back_what_could_run_beside_a_message_that_waits():
    def programs():
        return made([send(1), send(1), reduce(TWO)], [reduce(TWO), 0, receive(0), receive(0)], [])

    assert faults(programs(), EAGER) == []
    assert faults(programs(), Rules(eager=True, one_queue=True))


def test_communicators_that_wait_for_idle_devices_hang_where_one_is_not():
    def programs():
        return made([send(1), reduce(TWO), send(2)], [reduce(TWO), receive(0)], [receive(0)])

    assert faults(programs(), Rules(idle_to_make=True))
