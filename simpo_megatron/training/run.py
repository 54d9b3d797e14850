"""The door to a run: megatron is imported when one begins, and first made ready for this machine."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from simpo_megatron.collector import collector_at_rest
from simpo_megatron.config import Config
from simpo_megatron.reporting.loggers import Sink
from simpo_megatron.training.result import RunResult, result_of
from simpo_megatron.training.start.start_times import end_phase


def load_libraries() -> None:
    """Import megatron and all else that a run on this machine needs."""
    with collector_at_rest():
        from simpo_megatron.mcore import cpu_patches

        cpu_patches.hide_unloadable_transformer_engine()
        cpu_patches.import_uncompiled()
        # torch's optimizers load it when they are made.
        importlib.import_module("torch._dynamo")
        importlib.import_module("simpo_megatron.training.loop")
    end_phase("imports")


def train(config: Config, sinks: Sequence[Sink] = ()) -> RunResult:
    """Trains by `config` and returns the result; `sinks` get the records too, beside the loggers of `config`.

    Runs on the ranks that torchrun started. A plain process or a notebook is the only rank, and may train again.

    Raises:
        SimPOError: a mistake that the user can mend; one in the configuration alone, before any collective.
        PeerFailedError: another rank failed.
        StoppedBySignal: on every rank alike, after a whole step and a checkpoint, when a rank was told to stop.
        StoppedByMonitor: on every rank alike, after a whole step, when a monitor in `stop_on` raised an alarm.
            Both carry the run's `result`.
    """
    load_libraries()
    from simpo_megatron.training.loop import run_in
    from simpo_megatron.training.session import open_session

    with open_session(config) as session:
        stopped, evaluations = run_in(session, session.plan, sinks)
    result = result_of(config, evaluations, stopped)
    if stopped is not None:
        stopped.result = result
        raise stopped
    return result
