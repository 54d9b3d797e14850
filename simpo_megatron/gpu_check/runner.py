"""Runs checks one after the other in a second process, which is killed when a check takes too long."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TextIO

from simpo_megatron.atomic import scratch_folder
from simpo_megatron.gpu_check.verdict import Check, CheckSetting, Verdict

_REHEARSAL_SECONDS = 900
"""A check's time limit in a rehearsal, on any machine under any load."""
_LONGEST_START_SECONDS = 120
_LEAST_SECONDS = 5


def run_checks(
    checks: Sequence[Check], setting: CheckSetting, out: TextIO, seconds: float, say: Callable[[str], None]
) -> int:
    """Runs `checks`; returns the number of those that failed.

    Args:
        out: gets one JSON object a line, on disk before the next check starts.
        seconds: the time for all; checks that it does not reach are skipped by name.
        say: gets a readable line a check.
    """
    deadline, num_failed, worker = time.monotonic() + seconds, 0, _Worker(setting)
    try:
        for check in checks:
            started = time.monotonic()
            limit = _REHEARSAL_SECONDS if setting.rehearse else check.seconds
            verdict = worker.run(check, limit, deadline)
            num_failed += verdict.result == "FAIL"
            took = time.monotonic() - started
            line = {"check": check.name, "title": check.title, **asdict(verdict), "seconds": round(took, 1)}
            # JSON has no numbers for an error that is infinite; they are written as words.
            strict = json.loads(json.dumps(line), parse_constant=str)
            out.write(json.dumps(strict) + "\n")
            out.flush()
            os.fsync(out.fileno())
            budget = f"  (budget: {verdict.budget})" if verdict.budget else ""
            say(f"{verdict.result}  {check.name}  {check.title}: {verdict.value}{budget}  {took:.0f} s")
    finally:
        worker.end()
    return num_failed


class _Worker:
    """The process in which checks run; a new one after one that was ended or died."""

    def __init__(self, setting: CheckSetting) -> None:
        self._setting = setting
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def run(self, check: Check, seconds: float, deadline: float) -> Verdict:
        """The verdict of `check`, FAIL if there is none after so many seconds, SKIP if too few are left for it."""
        if time.monotonic() < deadline and (self._process is None or not self._process.is_alive()):
            self._start(deadline)
        seconds = min(seconds, deadline - time.monotonic())
        if seconds < _LEAST_SECONDS:
            return Verdict.skip("out of time")
        assert self._connection is not None and self._process is not None
        try:
            self._connection.send(check)
            if not self._connection.poll(seconds):
                self.end()
                return Verdict("FAIL", f"no verdict after {seconds:.0f} s", f"{seconds:.0f} s")
            verdict: Verdict = self._connection.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            code = self._process.exitcode
            return Verdict("FAIL", f"its process ended with exit code {code}; {self._setting.log}", "a verdict")
        return verdict

    def _start(self, deadline: float) -> None:
        # The child must not inherit CUDA state of this process.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._setting))
        self._process.start()
        theirs.close()
        # The time of its imports counts for no check. A process that does not start fails its check.
        with suppress(EOFError):
            if self._connection.poll(min(_LONGEST_START_SECONDS, deadline - time.monotonic())):
                self._connection.recv()

    def end(self) -> None:
        """Ends the process and its children."""
        if self._process is None or self._process.pid is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._process = None


def _serve(connection: Connection, setting: CheckSetting) -> None:
    """Runs the checks that it receives and sends their verdicts, until the other end is closed."""
    os.setsid()
    log = os.open(setting.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send("ready")
    while True:
        try:
            check: Check = connection.recv()
        except EOFError:
            return
        print(f"--- {check.name}", flush=True)
        connection.send(_verdict(check, setting))


def _end_with_parent() -> None:
    """Ends this process and its children when its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _verdict(check: Check, setting: CheckSetting) -> Verdict:
    """The verdict of one check; an exception is a failure with its type and first line."""
    try:
        verdict = check.run(setting)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return Verdict("FAIL", f"{type(error).__name__}: {lines[0][:300]}", "no error")
    finally:
        sys.stdout.flush()
        _free_memory(setting)
    return verdict


def _free_memory(setting: CheckSetting) -> None:
    gc.collect()
    if not setting.rehearse:
        import torch

        torch.cuda.empty_cache()


def working_folder() -> AbstractContextManager[Path]:
    """A folder for the checks of a run: up to 3 GB, which a killed command leaves and the next one removes."""
    return scratch_folder(Path(tempfile.gettempdir()) / "gpu-check")


def open_results(path: Path) -> TextIO:
    """The file of results, a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")
