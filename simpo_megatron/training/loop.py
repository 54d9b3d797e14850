"""The run: start or resume, step, log, evaluate, save, export. The only loop over steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from simpo_megatron import faults, parallel
from simpo_megatron.checkpoint import manifest
from simpo_megatron.config import Config
from simpo_megatron.errors import NumericsError, SimPOError, StoppedByMonitor, StoppedBySignal
from simpo_megatron.ranks import sync_status
from simpo_megatron.reporting.continuations import keep_samples
from simpo_megatron.reporting.loggers import RunLog, Sink, open_run_log
from simpo_megatron.reporting.validation_pairs import keep_validation_pairs
from simpo_megatron.stop_signals import StopSignals
from simpo_megatron.training.checkpoint_manager import Saver
from simpo_megatron.training.consistency import check_replicas, check_same, check_same_model, job_facts, unchanged_model
from simpo_megatron.training.evaluation import evaluate
from simpo_megatron.training.finish import finish
from simpo_megatron.training.introduction import introduce
from simpo_megatron.training.log_window import LogWindow
from simpo_megatron.training.memory_check import probe_memory
from simpo_megatron.training.metrics import time_of_start
from simpo_megatron.training.monitor_memory import NUM_SKIPPED
from simpo_megatron.training.monitors import Monitors
from simpo_megatron.training.profiling import Profiler, describe_profile
from simpo_megatron.training.reference import with_reference
from simpo_megatron.training.resume import (
    Start,
    continuing,
    find_checkpoint,
    held_run_folder,
    how_to_continue,
    start_run,
)
from simpo_megatron.training.run_plan import RunPlan
from simpo_megatron.training.save_schedule import SaveSchedule
from simpo_megatron.training.session import LONG_SECONDS, Session
from simpo_megatron.training.setup import Job
from simpo_megatron.training.step import Step, train_step
from simpo_megatron.training.watchdog import Watchdog

_start_is_told = False

Stopped = StoppedBySignal | StoppedByMonitor


def run_in(
    session: Session, plan: RunPlan, sinks: Sequence[Sink] = ()
) -> tuple[Stopped | None, dict[int, dict[str, float]]]:
    """Runs `plan` in a session; returns why it ended early, if it did, and its evaluations by iteration.

    Runs of one session share model, pairs and layout. Each gives bit for bit what it would give alone.

    Raises:
        SimPOError, PeerFailedError: as `run.train`. After a NumericsError the session's next run can be taken.
    """
    config, watchdog, signals = plan.config, session.watchdog, session.signals
    signals.describe_end = lambda: f"stopped between steps; {how_to_continue(config)}"
    parallel.seed_everything(config.run.seed)
    with held_run_folder(config):
        found = find_checkpoint(config)
        if found.checkpoint is None or config.lora.lora_rank is not None:
            check_same_model(plan.sources.folders)
        with unchanged_model(plan.sources.folders):
            job = session.build_job(config, plan, load_weights=found.checkpoint is None)
        job, reference_notes = with_reference(config, job, has_initial_weights=found.checkpoint is None)
        start = start_run(config, job, found)
        check_same(job_facts(job))
        check_replicas(job.trainer.chunks, session.groups)
        is_logging_rank = dist.get_rank() == 0
        with open_run_log(config, sinks, train_iters=job.train_iters, is_logging_rank=is_logging_rank) as log:
            introduce(config, job, found.notes + reference_notes + start.notes, log, session.told)
            stopped: Stopped | None = None
            evaluations: dict[int, dict[str, float]] = {}
            saver = Saver(config, job, log, watchdog)
            if start.iteration < job.train_iters:
                profiler = Profiler(config, start.iteration + 1)
                with saver, profiler:
                    stopped, evaluations = _run_steps(config, job, start, log, signals, watchdog, saver, profiler)
            else:
                log.say(f"resume    all {job.train_iters:,} steps were taken before; --resume none trains again")
            if isinstance(stopped, StoppedBySignal):
                signals.ignore_from_now_on()
            else:
                signals.raise_from_now_on()
            if stopped is None:
                watchdog.enter_phase("the end", timeout=LONG_SECONDS)
                finish(config, job, log)
            if not isinstance(stopped, StoppedByMonitor):
                saver.require_last()
    return stopped, evaluations


def _run_steps(
    config: Config,
    job: Job,
    start: Start,
    log: RunLog,
    signals: StopSignals,
    watchdog: Watchdog,
    saver: Saver,
    profiler: Profiler,
) -> tuple[Stopped | None, dict[int, dict[str, float]]]:
    """Runs the steps; returns why they ended early, if they did, and the evaluations by iteration.

    The reason is the same on every rank, after the same step.
    """
    trainer, run = job.trainer, config.run
    evaluations: dict[int, dict[str, float]] = {}
    signals.note_from_now_on()
    monitors, due = Monitors(config, job, start), SaveSchedule(run.save_interval, job.train_iters)
    watchdog.enter_phase("the memory probe", timeout=LONG_SECONDS)
    for line in probe_memory(config, job, start):
        log.say(line)
    if start.iteration == 0:
        watchdog.enter_phase("the evaluation before step 1", timeout=LONG_SECONDS)
        evaluations[0] = _evaluate(job, monitors, log, 0, run.save)
    taken = _DataProgress(start.consumed_pairs, start.monitors.get(NUM_SKIPPED, 0))
    for line in describe_profile(config, start.iteration + 1, job.train_iters):
        log.say(line)
    window = LogWindow(config, job)
    for iteration in range(start.iteration + 1, job.train_iters + 1):
        watchdog.enter_phase(f"step {iteration}", timeout=run.distributed_timeout_seconds_after_init)
        faults.at("step")
        with profiler.step(iteration):
            computed, grad_norm, learning_rate, noted = _finite_step(config, job, log, taken, due.asked_with(signals))
        window.add(computed)
        _tell_start(log)
        is_last, stop = iteration == job.train_iters, due.signal_in(noted)
        saves = run.save is not None and (is_last or stop or due.at(iteration, noted))
        # A checkpoint does not hold a window's sums, so a window ends at every checkpoint.
        if saves or is_last or _is_due(iteration, run.log_interval):
            metrics = window.close() | {"grad_norm": grad_norm, "learning_rate": learning_rate}
            metrics |= saver.metrics()
            log.step(iteration, monitors.step(iteration, metrics, taken.pairs))
        else:
            log.advance(iteration)
        evaluated: dict[str, float] = {}
        if is_last or _is_due(iteration, job.eval_interval) or (saves and not stop and monitors.evaluate_before_saving):
            watchdog.enter_phase(f"the evaluation after step {iteration}", timeout=LONG_SECONDS)
            evaluated = evaluations[iteration] = _evaluate(job, monitors, log, iteration, run.save)
        found = monitors.judge(iteration, log)
        if found is not None:
            return found, evaluations
        if saves:
            watchdog.enter_phase(f"the checkpoint of step {iteration}", timeout=LONG_SECONDS)
            check_replicas(trainer.chunks, trainer.groups)
            saver.save(
                iteration=iteration,
                consumed_pairs=taken.pairs,
                metrics=evaluated,
                # What was left out before a resume counts.
                monitors=monitors.remembered() | {NUM_SKIPPED: taken.num_skipped_steps},
                in_background=run.async_save and not (is_last or stop),
            )
        else:
            saver.poll()
        if saves or is_last:
            # A signal that came while this checkpoint was written needs no second one.
            stop = stop or sync_status(None, signals.noted())
            due.restart_clock()
        if stop:
            return _stopped(config, signal.Signals(stop).name, iteration), evaluations
        if saves or evaluated:
            window.restart_clock()
    return None, evaluations


def _tell_start(log: RunLog) -> None:
    """Say how long this process took to its first step, after that step alone."""
    global _start_is_told
    if not _start_is_told:
        seconds, cpu_seconds = time_of_start()
        log.say(f"start     first step done {seconds:.1f} s after this process began ({cpu_seconds:.1f} s of CPU)")
        _start_is_told = True


@dataclass
class _DataProgress:
    """Pairs taken from the data so far, over all starts of the run."""

    pairs: int
    num_skipped_steps: int = 0


def _finite_step(config: Config, job: Job, log: RunLog, taken: _DataProgress, noted: Callable[[], int]) -> Step:
    """The next step whose losses and gradient are finite; the pairs of other steps are skipped.

    Raises:
        NumericsError: on every rank alike, when that has happened more than `skip_nonfinite_steps` times in this run.
    """
    at_most = config.run.skip_nonfinite_steps
    while True:
        plan = job.trainer.plan_step(job.train_data, taken.pairs)
        taken.pairs += config.batch.global_batch_size
        try:
            return train_step(job.trainer, job.train_data, plan, noted)
        except NumericsError as error:
            taken.num_skipped_steps += 1
            if taken.num_skipped_steps > at_most:
                raise NumericsError(
                    f"{error}; {taken.num_skipped_steps - 1} such steps were skipped in this run, and "
                    f"skip_nonfinite_steps allows {at_most}"
                ) from None
            log.say(f"WARNING   step skipped ({taken.num_skipped_steps} of at most {at_most}): {error}")


def _stopped(config: Config, signal_name: str, iteration: int) -> StoppedBySignal:
    kept = "nothing is kept: no --save"
    if config.run.save is not None:
        kept = f"saved in {manifest.committed(Path(config.run.save))[-1]}; {continuing(config)}"
    return StoppedBySignal(f"{signal_name}: stopped after step {iteration}, {kept}")


def _is_due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _evaluate(job: Job, monitors: Monitors, log: RunLog, iteration: int, save: str | None) -> dict[str, float]:
    """The validation metrics under the names they are logged by; none without validation pairs.

    The log-probs of each pair of the first set and the samples of the repetition probe are kept in `save`, if given.
    """
    found = evaluate(job.trainer, job.valid_data, is_untrained=iteration == 0)
    metrics = monitors.evaluation(iteration, found.metrics)
    if metrics:
        log.evaluation(iteration, metrics)
    if found.averages is not None and save is not None and dist.get_rank() == 0:
        try:
            keep_validation_pairs(Path(save), iteration, found.averages, next(iter(job.valid_data.values())))
            if monitors.samples:
                keep_samples(Path(save), iteration, *zip(*monitors.samples, strict=True))
        except SimPOError as error:
            # Only the report misses them.
            log.say(f"WARNING   {error}; the run continues without it")
    return metrics
