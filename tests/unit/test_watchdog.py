"""The line about ranks that did not arrive, from their answers."""

from __future__ import annotations

import re
import sys
import threading

import pytest
import torch.distributed as dist

from simpo_megatron.errors import CheckpointError, NumericsError
from simpo_megatron.training.peers.watchdog import _innermost, _is_lost_connection, _own_line, _waits, verdict


def answer(number=3, line="loop.py:1 (f)", waits=True):
    return {"number": number, "where": f"step {number}", "line": line, "waits": waits}


CASES = {
    "one rank does not answer": (
        {0: answer(), 2: answer()},
        {1: "step 2"},
        "rank 1 (last phase: step 2) stopped responding; likely killed (out of memory?) or unreachable, check dmesg "
        "and its log",
    ),
    "one rank is a phase behind, though it waits": (
        {0: answer(), 1: answer(2, "save.py:9 (g)"), 2: answer()},
        {},
        "rank 1 is in step 2 at save.py:9 (g); the others wait for it in step 3 at loop.py:1 (f)",
    ),
    "one rank computes while the others wait": (
        {0: answer(), 1: answer(), 2: answer(line="read.py:5 (h)", waits=False)},
        {},
        "rank 2 is in step 3 at read.py:5 (h); the others wait for it in step 3 at loop.py:1 (f)",
    ),
    "all wait for each other": (
        {0: answer(line="a.py:1 (a)"), 1: answer(line="b.py:2 (b)")},
        {},
        "could not tell which rank is stuck; rank 0 is in step 3 at a.py:1 (a), rank 1 is in step 3 at b.py:2 (b)",
    ),
    "none waits": (
        {0: answer(waits=False), 1: answer(waits=False)},
        {},
        "could not tell which rank is stuck; rank 0 is in step 3 at loop.py:1 (f), "
        "rank 1 is in step 3 at loop.py:1 (f)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rank_that_did_not_arrive_is_named(case):
    answers, silent, expected = CASES[case]
    assert verdict(answers, silent) == expected


def test_a_thousand_silent_ranks_make_one_readable_line():
    said = verdict({0: answer()}, dict.fromkeys(range(1, 1000), "step 2"))
    assert len(said) < 500 and "and 991 more" in said


def test_a_place_is_named_from_the_package_down():
    with pytest.raises(ValueError) as raised:
        verdict({}, {})
    assert re.fullmatch(r"simpo_megatron/training/peers/watchdog.py:\d+ \(verdict\)", _own_line(_innermost(raised.tb)))


def test_a_thread_that_works_does_not_count_as_waiting_and_one_in_a_wait_does():
    started, ends = threading.Event(), threading.Event()

    def work():
        started.set()
        while not ends.is_set():
            sum(range(1000))

    def wait():
        ends.wait()

    threads = [threading.Thread(target=work), threading.Thread(target=wait)]
    for thread in threads:
        thread.start()
    started.wait()
    waiting = None
    while waiting is None:  # a thread that was started may not have got there yet
        frames = sys._current_frames()
        working, waiting = (frames[thread.ident] for thread in threads)
        while waiting is not None and waiting.f_code is not wait.__code__:
            waiting = waiting.f_back
    found = _waits(working), _waits(waiting)
    ends.set()
    for thread in threads:
        thread.join()
    assert found == (False, True)


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:12"), True),
        (dist.DistBackendError("NCCL error in: ...: remote process exited"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("Connection closed"), False),
        (NumericsError("the loss is nan, NCCL or not"), False),
        (caused(CheckpointError("no checkpoint"), RuntimeError("Read error: Connection reset by peer")), True),
        (caused(CheckpointError("no checkpoint"), OSError("No space left on device")), False),
    ],
)
def test_a_lost_connection_is_told_from_a_mistake_of_this_rank(error, is_lost):
    assert _is_lost_connection(error) is is_lost
