"""Ranks that a launcher started meet within two minutes, or one line says why not: who failed, who is missing."""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback

import pytest
import torch.distributed as dist
from ranks import free_port

from simpo_megatron.errors import ConfigError, DataError, ParallelError, PeerFailedError
from simpo_megatron.training.peers import meeting
from simpo_megatron.training.peers.telling import errors_told

pytestmark = pytest.mark.processes


@pytest.fixture
def address():
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}


def start(work, rank, world, address):
    """(process id, where its answer can be read) of a forked rank that does `work`."""
    answer, answers = os.pipe()
    process = os.fork()
    if process == 0:
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(world))
        try:
            os.write(answers, pickle.dumps(work()))
        except BaseException as error:
            traceback.print_exc()
            os.write(answers, pickle.dumps((type(error), str(error), getattr(error, "speaker", "?"), error.exit_code)))
        finally:
            os._exit(0)
    os.close(answers)
    return process, answer


def answer_of(rank):
    process, answer = rank
    # One read, for rank 0's store, which outlives it, has the other end of the pipe, too.
    told = os.read(answer, 1 << 16)
    os.close(answer)
    os.waitpid(process, 0)
    return pickle.loads(told)


def met():
    found = meeting.meet()
    found.store.set(f"word/{found.rank}", "here")
    words = [found.another_connection().get(f"word/{rank}").decode() for rank in range(found.world)]
    found.leave()
    return words


def test_ranks_that_are_all_there_meet_in_a_store_of_theirs(address):
    ranks = [start(met, rank, 3, address) for rank in range(3)]
    assert [answer_of(rank) for rank in ranks] == [["here"] * 3] * 3


def test_who_is_missing_after_the_time_is_named_once(address, monkeypatch):
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 6.0)
    ranks = [start(met, rank, 4, address) for rank in (0, 2)]
    told = [answer_of(rank) for rank in ranks]
    speakers = {speaker for _, _, speaker, _ in told}
    assert {kind for kind, *_ in told} == {ParallelError} and len(speakers) == 1 and speakers <= {0, 2}
    (text,) = {text for _, text, *_ in told}
    assert text.startswith("ranks: found 2 of 4 after 6 s, expected all; missing: ranks 1, 3; there: ")
    assert "(ranks 0, 2); see whether the missing ones were started" in text


def test_a_rank_without_a_first_rank_says_that_it_cannot_reach_it(address, monkeypatch):
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 2.0)
    kind, text, speaker, code = answer_of(start(met, 1, 2, address))
    assert kind is ConfigError and speaker == 1 and code == 2
    assert f"rank 1 could not connect to 127.0.0.1:{address['MASTER_PORT']}: Connection refused, for 2 s" in text


def failing(text):
    def work():
        with errors_told():
            raise DataError(text)

    return work


def test_a_rank_that_fails_before_they_meet_says_so_and_the_others_end(address):
    ranks = [start(met, 0, 3, address), start(failing("a.jsonl: gone"), 1, 3, address), start(met, 2, 3, address)]
    first, failed, other = map(answer_of, ranks)
    assert failed == (DataError, "a.jsonl: gone", 1, 3)
    text = "stopped because rank 1 failed before all ranks had met: a.jsonl: gone"
    assert first == (PeerFailedError, text, 0, 3), "the first rank's log alone tells it too"
    assert other == (PeerFailedError, text, None, 3)


def test_what_all_ranks_find_is_said_by_one(address):
    ranks = [start(failing("a.jsonl: gone"), rank, 3, address) for rank in range(3)]
    (speaker,) = {speaker for _, _, speaker, _ in map(answer_of, ranks)}
    assert speaker in range(3)


def test_the_store_outlives_the_first_rank_and_is_not_taken_for_that_of_the_next_start(address):
    def killed():
        meeting.meet().store.set("word", "last")
        os.kill(os.getpid(), signal.SIGKILL)

    def waits():
        found = meeting.meet()
        time.sleep(1.0)
        word = found.store.get("word").decode()
        found.leave()
        return word

    first, other = start(killed, 0, 2, address), start(waits, 1, 2, address)
    os.waitpid(first[0], 0)
    assert answer_of(other) == "last"

    # At once, and at the same port, which the store of the killed rank still has for some seconds.
    again = [start(met, rank, 2, address) for rank in range(2)]
    assert [answer_of(rank) for rank in again] == [["here"] * 2] * 2


def test_a_process_alone_needs_no_store_of_others(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    found = meeting.meet()
    assert (found.rank, found.world) == (0, 1) and isinstance(found.another_connection(), dist.HashStore)
