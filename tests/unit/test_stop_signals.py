"""A signal asks a run to stop: before its steps at once, among them after one; the second ends the process."""

from __future__ import annotations

import ast
import os
import signal
import time
from pathlib import Path

import pytest

from simpo_megatron import stop_signals
from simpo_megatron.errors import StoppedBySignal
from simpo_megatron.stop_signals import STOP_SIGNALS, StopSignals


@pytest.fixture(params=STOP_SIGNALS)
def number(request):
    """A signal that has a handler of the test's own, and who heard it."""
    heard = []
    before = signal.signal(request.param, lambda *_: heard.append("mine"))
    yield request.param
    assert heard == [], "what came in the context was the run's"
    signal.signal(request.param, before)


def settled(signals, attribute):
    deadline = time.monotonic() + 60
    while getattr(signals, attribute) is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_before_the_steps_a_signal_raises_with_where_the_run_goes_on(number):
    mine = signal.getsignal(number)
    with pytest.raises(StoppedBySignal, match=f"{number.name}: the last one is here"), StopSignals() as signals:
        signals.describe_end = lambda: "the last one is here"
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert signal.getsignal(number) is mine and stop_signals.current is None


def test_among_the_steps_it_is_noted_and_said_once(number, capfd, monkeypatch):
    monkeypatch.setattr(stop_signals, "SAME_REQUEST_SECONDS", float("inf"))
    mine = signal.getsignal(number)
    with StopSignals() as signals:
        signals.note_from_now_on()
        assert signals.noted() == 0
        os.kill(os.getpid(), number)
        settled(signals, "_heard_at")
        assert signals.noted() == number
        if number != signal.SIGINT:
            # Another one within moments is the same request.
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        signals.ignore_from_now_on()
        os.kill(os.getpid(), signal.SIGINT if number == signal.SIGINT else number)
        time.sleep(0.1)
    assert signal.getsignal(number) is mine
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"STOPPING simpo_megatron rank 0: {number.name} received; stopping after this step")


def test_what_was_noted_after_the_last_step_is_raised_when_the_steps_are_over(number):
    with pytest.raises(StoppedBySignal, match=number.name), StopSignals() as signals:
        signals.note_from_now_on()
        os.kill(os.getpid(), number)
        settled(signals, "_heard_at")
        signals.raise_from_now_on()


@pytest.mark.processes
@pytest.mark.parametrize(("second", "wait"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.6)])
def test_the_second_ends_the_process_with_a_line(second, wait, capfd, monkeypatch):
    monkeypatch.setattr(stop_signals, "SAME_REQUEST_SECONDS", 0.5)
    process = os.fork()
    if process == 0:
        with StopSignals() as signals:
            signals.note_from_now_on()
            signals.describe_end = lambda: "the last checkpoint is here"
            os.kill(os.getpid(), signal.SIGTERM)
            settled(signals, "_heard_at")
            time.sleep(wait)
            os.kill(os.getpid(), second)
            while True:
                time.sleep(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + second
    said = capfd.readouterr().err.splitlines()[-1]
    assert f"{second.name}, the second signal: ended at once; the last checkpoint is here" in said


@pytest.mark.processes
def test_a_run_that_waits_in_a_library_ends_after_a_moment(capfd, monkeypatch):
    monkeypatch.setattr(stop_signals, "_UNWIND_SECONDS", 0.3)
    process = os.fork()
    if process == 0:
        signals = StopSignals().__enter__()
        signals.on_stuck = lambda stopped: stopped.exit_code
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except StoppedBySignal:
            time.sleep(20)  # whatever unwinding does
        os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 75


def test_nohup_means_what_it_says():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_a_command_signals_are_ignored_once_its_run_is_over():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with StopSignals() as outer:
            with StopSignals():
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            assert outer.noted() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Where a stop is told to other ranks, or comes too late to matter, or signals are noted and not raised.
MAY_CATCH_A_STOP = {
    "gpu_check/",
    "ranks.py",
    "training/launch.py",
    "training/finish.py",
    "training/loop.py",
    "training/peers/watchdog.py",
    "training/saving/checkpoint_manager.py",
    "checkpoint/writer.py",
    "reporting/loggers.py",
    "mcore/microbatch/batch.py",
    "data/store/workers.py",
}


def _swallows(handler: ast.ExceptHandler, earlier: list[ast.ExceptHandler]) -> bool:
    caught = ast.unparse(handler.type) if handler.type is not None else "BaseException"
    if caught not in ("Exception", "BaseException"):
        return False
    raises = any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))
    return not raises and not any("StoppedBySignal" in ast.unparse(one.type) for one in earlier if one.type is not None)


def test_no_handler_of_all_errors_takes_a_stop_for_a_fault_of_a_file():
    package = Path(stop_signals.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        name = str(path.relative_to(package))
        if name.startswith(tuple(MAY_CATCH_A_STOP)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try):
                for number, handler in enumerate(node.handlers):
                    if _swallows(handler, node.handlers[:number]):
                        found.append(f"{name}:{handler.lineno}")
    assert found == []
