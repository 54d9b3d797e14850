"""Messages to the store and bytes of collectives, a rank, do not grow with the number of ranks: counted at 2 to 256."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from counts import check_counts

from simpo_megatron.checkpoint.writer import Writing
from simpo_megatron.training.peers import meeting, watchdog
from tools.benchmarks.fake_ranks import (
    WORLDS,
    bytes_of_guards,
    messages_of_a_verdict,
    messages_of_a_watch,
    messages_to_meet,
    write_model,
)

# The pauses of the guards are this many times shorter here.
FASTER = 10


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", watchdog._POLL_SECONDS / FASTER)
    monkeypatch.setattr(watchdog, "_MAX_POLLS_A_SECOND", watchdog._MAX_POLLS_A_SECOND * FASTER)
    monkeypatch.setattr(meeting, "_LAST_PAUSE_SECONDS", meeting._LAST_PAUSE_SECONDS / FASTER)


def test_a_rank_sends_the_store_a_bounded_number_of_messages_at_any_size_of_the_world():
    seconds, num_steps = 5, 3
    verdicts = set()
    for world in (2, 32, 256):
        # A busy machine makes pauses longer, and never shorter.
        watch, took = messages_of_a_watch(world, seconds / FASTER, num_steps)
        assert watch <= FASTER * took + num_steps + 1, f"{watch} within {took} s at {world} ranks"
        waiting, took = messages_to_meet(world, late_seconds=seconds / FASTER)
        assert waiting <= FASTER * took + 10, f"{waiting} within {took} s at {world} ranks"
        verdicts.add(messages_of_a_verdict(world, num_silent=1))
    ((answer, verdict),) = verdicts
    check_counts("messages of a rank", {"to answer an alarm": answer, "to say who is missing": verdict})


@pytest.mark.parametrize("world", [2, 256, 1000, 4096, 100_000])
def test_an_alarm_is_heard_and_answered_within_the_promised_time(world, monkeypatch):
    monkeypatch.undo()
    polls = watchdog.poll_seconds(world)
    assert world / polls <= max(1000, world / 4)
    # It is heard, the ranks answer, and if the one that raised it has ended, another one speaks.
    assert polls + (polls + watchdog._ANSWER_SECONDS) <= 15 and watchdog._ANSWER_SECONDS >= 3
    assert polls + 2 * watchdog._END_SECONDS <= 15
    assert polls < watchdog._MAX_UNANSWERED, "an answer now and then shows that the store is there"


def test_what_guards_bring_to_a_rank_is_the_same_at_any_size_of_the_world(tmp_path):
    model = write_model(tmp_path)
    small, *larger = [bytes_of_guards(world, model) for world in WORLDS]
    gathered = "save: digests of shards"
    for world, found in zip(WORLDS[1:], larger, strict=True):
        grown = {name for name in found if found[name] > small[name]}
        assert grown <= {gathered}, f"more bytes at {world} ranks"
    # Rank 0 alone needs what each rank wrote: some hundred bytes of each.
    a_rank = math.ceil(larger[-1][gathered] / WORLDS[-1])
    check_counts("bytes to a rank", {**larger[-1], gathered: a_rank})


def test_a_rank_that_writes_its_share_of_a_checkpoint_lists_no_folder(tmp_path, monkeypatch):
    bucket = (str(tmp_path / "__7_0.distcp"), "__7_0.distcp", ([], []))

    def write(rank, buckets, results):
        for path, *_ in buckets:
            Path(path).write_bytes(b"shard")

    request = SimpleNamespace(async_fn=write, async_fn_kwargs={})
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("a listing grows with the number of ranks"))
    writing = Writing(request, [7, [bucket], None], tmp_path, 5)
    writing.start(in_background=False)
    assert {name: digest.size for name, digest in writing._result().items()} == {"__7_0.distcp": 5}
