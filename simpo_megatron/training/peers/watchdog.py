"""The watchdog: names a rank that fails or does not arrive, and ends the run instead of waiting for it.

Ranks talk through the store of their rendezvous, outside all collectives, so also while a collective hangs.
"""

from __future__ import annotations

import _thread
import json
import linecache
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

import simpo_megatron
from simpo_megatron.errors import (
    ParallelError,
    PeerFailedError,
    SimPOError,
    StoppedBySignal,
    listed,
    report_error,
    status_line,
)
from simpo_megatron.launched import PARENT, has_agent, is_launched
from simpo_megatron.stop_signals import StopSignals
from simpo_megatron.training.peers.meeting import Meeting

_PACKAGE = Path(simpo_megatron.__file__).parent
_ALARM, _TOLD, _ANSWERS = "alarm", "told", "answers"
_POLL_SECONDS = 1.0
# More ranks than that ask the store less often: it answers some ten thousand questions a second, and has more to do.
_MAX_POLLS_A_SECOND, _MAX_POLL_SECONDS = 1000, 4.0
# A rank that has seen an alarm answers within this time.
_ANSWER_SECONDS = 3.0
# A rank whose peer failed ends by itself within this time, or twice of it.
_END_SECONDS = 4.0
# A store that has not answered for so many polls is gone, or frozen with its machine.
_MAX_UNANSWERED = 10
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timeout", "NCCL", "gloo")
_MAX_NAMED = 8


class Watchdog:
    """While the context lasts, the end of one rank ends all ranks, and one line says which rank it was and why.

    `enter_phase` names the phase that starts and its time limit. When the limit passes, or a connection is lost, every
    rank is asked where it is. One of them prints which rank did not arrive or does not answer, and all end with the
    exit code of a ParallelError. When a rank raises an error alone, the others read its text and end within seconds,
    whatever they wait for. The same happens when a signal stops a rank. When the store or torchrun's agent is gone,
    all ranks end, and one rank of each node prints it.

    A process that no launcher started is the only rank: a phase beyond its limit is printed, and the run goes on.

    Costs: one message to the store for each phase, and, from a thread, one a second, of all ranks 1,000 a second.
    """

    def __init__(self, meeting: Meeting, signals: StopSignals) -> None:
        self._meeting, self._rank, self._world, self._store = meeting, meeting.rank, meeting.world, meeting.store
        self._thread_store = meeting.another_connection()
        self._number, self._where, self._limit = 0, "start-up", float("inf")
        self._started = time.monotonic()
        self._main = threading.get_ident()
        self._lost_at: FrameType | None = None
        self._leaving = threading.Event()
        self._num_unanswered, self._is_store_lost = 0, False
        self._poll_seconds = poll_seconds(self._world)
        signals.on_stuck = self._leave_stopped
        self._threads = [threading.Thread(target=self._ask, name="watch", daemon=True)]
        if is_launched():
            self._threads.append(threading.Thread(target=self._guard, name="guard", daemon=True))

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and is_launched():
            self._tell(error, trace)
        self._leaving.set()
        self._meeting.leave()

    def _tell(self, error: Exception, trace: TracebackType | None) -> None:
        """Report an error of this rank to the others, which may have the same."""
        if isinstance(error, StoppedBySignal):
            alarm = self._raise_alarm(self._store, "stopped", str(error), error)
            error.speaker, error.exit_code = alarm["rank"], alarm["exit_code"]
            return
        if not _is_lost_connection(error):
            self._leaving.set()
            self._raise_alarm(self._store, "failed", _failure(error, self._rank, self._where), error)
            return
        self._lost_at = _innermost(trace)
        alarm = self._raise_alarm(self._store, "lost", f"a connection was lost in {self._where}")
        if alarm["kind"] == "failed":
            self._leaving.set()
            raise self._peer_error(alarm) from error
        # The threads poll the store, answer an alarm, and end the process.
        self._threads[-1].join()

    def enter_phase(self, name: str, *, timeout: float) -> None:
        """Note that this rank enters the phase `name`, which may last `timeout` seconds.

        Phases are the same, in the same order, on every rank.
        """
        self._number, self._where, self._limit, self._started = self._number + 1, name, timeout, time.monotonic()
        self._store.set(f"at/{self._rank}", name)

    def _ask(self) -> None:
        store = self._thread_store
        while not self._leaving.wait(self._poll_seconds):
            try:
                if store.check([_ALARM]):
                    self._heed(json.loads(store.get(_ALARM)))
                elif time.monotonic() - self._started > self._limit:
                    self._raise_timeout(store)
            except dist.DistError:
                self._is_store_lost = True
                return
            self._num_unanswered = 0

    def _guard(self) -> None:
        """End this process when the store does not answer, or torchrun's agent is gone, which would have ended it."""
        while not self._leaving.wait(_POLL_SECONDS):
            self._num_unanswered += 1
            if has_agent() and os.getppid() != PARENT:
                why = f"torchrun, process {PARENT}, which started the ranks, is gone"
            elif self._is_store_lost or self._num_unanswered > _MAX_UNANSWERED:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                why = (
                    f"the ranks' store at {where} does not answer; its machine, or rank 0's launcher, is gone or frozen"
                )
            else:
                continue
            speaks = self._meeting.speaks_for_node()
            # The rank that is ending may find the store gone before the others do.
            if not self._leaving.wait(2 * _POLL_SECONDS):
                if speaks:
                    report_error(ParallelError(f"stopped in {self._where} because {why}"), rank=self._rank)
                _leave(ParallelError.exit_code)

    def _raise_timeout(self, store: dist.Store) -> None:
        text = _timeout(self._where, self._limit)
        if is_launched():
            self._raise_alarm(store, "late", text)
            return
        place = _own_line(sys._current_frames()[self._main])
        print(status_line("WARNING", f"{text}; it is at {place} and goes on"), file=sys.stderr, flush=True)
        self._started = time.monotonic()

    def _raise_alarm(self, store: dist.Store, kind: str, says: str, error: Exception | None = None) -> dict[str, Any]:
        """Raise this rank's alarm unless another rank has raised one; returns the first."""
        alarm = {
            "kind": kind,
            "rank": self._rank,
            "says": says,
            "exit_code": getattr(error, "exit_code", ParallelError.exit_code),
            "already_reported": not isinstance(error, SimPOError),
        }
        try:
            return json.loads(store.compare_set(_ALARM, "", json.dumps(alarm)))
        except dist.DistError:
            self._is_store_lost = True
            return alarm

    def _heed(self, alarm: dict[str, Any]) -> None:
        """Print the alarm, if this rank is the one to do it, and end this process."""
        if alarm["kind"] == "stopped":
            # If the main thread runs Python code, this unwinds it and removes its drafts.
            _thread.interrupt_main(signal.SIGTERM)
            if self._leaving.wait(2 * _END_SECONDS):
                return
            exit_code = alarm["exit_code"]
        elif alarm["kind"] == "failed":
            # What is ours the ranks have mostly agreed on: this one may be leaving already, closing what is open.
            if self._leaving.wait(_END_SECONDS if alarm["already_reported"] else 2 * _END_SECONDS):
                return
            exit_code = self._peer_error(alarm).exit_code
        else:
            self._tell_who_is_missing(alarm)
            exit_code = ParallelError.exit_code
        _leave(exit_code)

    def _tell_who_is_missing(self, alarm: dict[str, Any]) -> None:
        self._answer()
        # The rank that raised the alarm prints it; if that rank has ended, another one does.
        answered = self._poll_seconds + _ANSWER_SECONDS
        time.sleep(answered if alarm["rank"] == self._rank else answered + self._poll_seconds)
        self._num_unanswered = 0
        if int(self._thread_store.compare_set(_TOLD, "", str(self._rank))) == self._rank:
            report_error(ParallelError(f"{alarm['says']}: {self._verdict()}"), rank=self._rank)
            # The first rank to end may make the launcher end the others, so the one that prints goes first.
            time.sleep(_POLL_SECONDS)

    def _leave_stopped(self, stopped: StoppedBySignal) -> int:
        """The exit code of a rank that a signal stopped while it waited for others; they have been told."""
        alarm = self._raise_alarm(self._thread_store, "stopped", str(stopped), stopped)
        if alarm["rank"] == self._rank:
            report_error(stopped, rank=self._rank)
        return alarm["exit_code"]

    def _peer_error(self, alarm: dict[str, Any]) -> PeerFailedError:
        error = PeerFailedError(f"stopped because {alarm['says']}")
        if alarm["already_reported"]:
            error.exit_code = ParallelError.exit_code
        else:
            error.exit_code = alarm["exit_code"]
        if self._rank == 0:
            report_error(error, rank=0, kind="STOPPED" if alarm["already_reported"] else None)
        return error

    def _answer(self) -> None:
        frame = self._lost_at or sys._current_frames()[self._main]
        here = {"number": self._number, "where": self._where, "line": _own_line(frame), "waits": _waits(frame)}
        # One text of all ranks, which one message brings to the rank that reads it.
        answer = json.dumps([self._rank, here]) + "\n"
        self._thread_store.append(_ANSWERS, answer)  # type: ignore[attr-defined]

    def _verdict(self) -> str:
        store = self._thread_store
        answers = dict(map(json.loads, store.get(_ANSWERS).decode().splitlines()))
        silent = {rank: "" for rank in range(self._world) if rank not in answers}
        for rank in list(silent)[:_MAX_NAMED]:
            silent[rank] = store.get(f"at/{rank}").decode() if store.check([f"at/{rank}"]) else "start-up"
        return verdict(answers, silent)


def _leave(exit_code: int) -> None:
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(exit_code)


def poll_seconds(world: int) -> float:
    """Seconds after which a rank of `world` asks the store again whether there is an alarm."""
    return min(max(_POLL_SECONDS, world / _MAX_POLLS_A_SECOND), _MAX_POLL_SECONDS)


def verdict(answers: dict[int, dict[str, Any]], silent: dict[int, str]) -> str:
    """The rank that did not arrive and where it is, from what ranks answered and where the silent ones were last seen.

    An answer has `number` (phases begun), `where` (the last one), `line` (of this package) and `waits` (for others).
    """
    if silent:
        shown = listed((f"rank {rank} (last phase: {where})" for rank, where in silent.items()), _MAX_NAMED)
        return f"{shown} stopped responding; likely killed (out of memory?) or unreachable, check dmesg and its log"
    furthest = max(answer["number"] for answer in answers.values())
    missing = {rank: a for rank, a in answers.items() if a["number"] < furthest}
    missing = missing or {rank: a for rank, a in answers.items() if not a["waits"]}
    told_apart = missing and len(missing) < len(answers)
    behind = (f"rank {rank} is in {a['where']} at {a['line']}" for rank, a in (missing or answers).items())
    shown = listed(behind, _MAX_NAMED)
    if not told_apart:
        return f"could not tell which rank is stuck; {shown}"
    waiting = next(a for rank, a in answers.items() if rank not in missing)
    return f"{shown}; the others wait for it in {waiting['where']} at {waiting['line']}"


def _timeout(where: str, limit_seconds: float) -> str:
    """The message on a phase beyond its limit; for a step, it names the option that sets the limit."""
    option = " (distributed_timeout_seconds_after_init)" if where.startswith("step ") else ""
    return f"timeout: {where} exceeded {limit_seconds:g} s{option}"


def _is_lost_connection(error: Exception) -> bool:
    """True when `error` is a peer's lost connection, and not this rank's own mistake."""
    is_told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
    if isinstance(error, dist.DistError) or is_told:
        return True
    return isinstance(error.__cause__, Exception) and _is_lost_connection(error.__cause__)


def _failure(error: Exception, rank: int, where: str) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"rank {rank} failed in {where}: {type(error).__name__}: {text} ({frame.filename}:{frame.lineno})"


def _innermost(trace: TracebackType | None) -> FrameType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame if trace is not None else None


def _own_line(frame: FrameType | None) -> str:
    """`file:line (function)` of the innermost frame of this package."""
    while frame is not None and not _is_own(frame):
        frame = frame.f_back
    if frame is None:
        return "its end"
    file = Path(frame.f_code.co_filename).relative_to(_PACKAGE.parent)
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"


def _is_own(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)


def _waits(frame: FrameType | None) -> bool:
    """True when the main thread, at `frame`, waits for other ranks in a collective or for an earlier one."""
    if frame is None:
        return False
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    inside = []
    while frame is not None and not _is_own(frame):
        inside.append(frame.f_code.co_filename)
        frame = frame.f_back
    return ".wait(" in line or any("/torch/distributed/" in file for file in inside)
