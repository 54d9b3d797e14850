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
from simpo_megatron.training.finish import finish, push
from simpo_megatron.training.log_window import LogWindow
from simpo_megatron.training.memory_check import probe_memory
from simpo_megatron.training.monitors import Monitors
from simpo_megatron.training.peers.consistency import (
    check_replicas,
    check_same,
    check_same_model,
    job_facts,
    unchanged_model,
)
from simpo_megatron.training.profiling import Profiler, describe_profile
from simpo_megatron.training.reference import with_reference
from simpo_megatron.training.saving import (
    NUM_SKIPPED,
    Saver,
    SaveSchedule,
    Start,
    continuing,
    find_checkpoint,
    held_run_folder,
    how_to_continue,
    start_run,
)
from simpo_megatron.training.session import LONG_SECONDS, Session
from simpo_megatron.training.start.introduction import introduce
from simpo_megatron.training.start.run_plan import RunPlan
from simpo_megatron.training.start.setup import Job
from simpo_megatron.training.start.start_times import describe_start, end_phase
from simpo_megatron.training.step import Step, evaluate, train_step, validation_log_probs

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
                with saver, Profiler(config, start.iteration + 1) as profiler:
                    steps = _Steps(config, job, start, log, session, saver)
                    stopped, evaluations = steps.run(profiler), steps.evaluations
            else:
                log.say(f"resume    all {job.train_iters:,} steps were taken before; --resume none trains again")
            if isinstance(stopped, StoppedBySignal):
                signals.ignore_from_now_on()
            else:
                signals.raise_from_now_on()
            if stopped is None:
                watchdog.enter_phase("the end", timeout=LONG_SECONDS)
                finish(config, job, log)
                # An upload of a large model takes longer than any other phase, and no rank waits for it.
                watchdog.enter_phase("the push to the hub", timeout=float("inf"))
                push(config, log)
                saver.require_last(config.model.export_hf or config.lora.export_adapter)
    return stopped, evaluations


class _Steps:
    """The steps of a run from its start to its last, with the evaluations and checkpoints that are due among them."""

    def __init__(self, config: Config, job: Job, start: Start, log: RunLog, session: Session, saver: Saver) -> None:
        self._config, self._job, self._start, self._log, self._saver = config, job, start, log, saver
        self._session, self._signals, self._watchdog = session, session.signals, session.watchdog
        self._monitors = Monitors(config, job, start)
        self._window = LogWindow(config, job)
        self._due = SaveSchedule(config.run.save_interval, job.train_iters)
        self._taken = _DataProgress(start.consumed_pairs, start.monitors.get(NUM_SKIPPED, 0))
        self.evaluations: dict[int, dict[str, float]] = {}
        """The validation metrics by iteration."""

    def run(self, profiler: Profiler) -> Stopped | None:
        """Takes the steps; returns why they ended early, if they did: on every rank alike, after the same step."""
        start, last = self._start.iteration, self._job.train_iters
        self._signals.note_from_now_on()
        end_phase("checks")
        self._watchdog.enter_phase("the memory probe", timeout=LONG_SECONDS)
        for line in probe_memory(self._config, self._job, self._start):
            self._log.say(line)
        if start == 0:
            self._evaluate(0, "the evaluation before step 1")
        for line in describe_profile(self._config, start + 1, last):
            self._log.say(line)
        end_phase("evaluation")
        self._window.restart_clock()
        for iteration in range(start + 1, last + 1):
            stopped = self._step(iteration, profiler)
            if stopped is not None:
                return stopped
        return None

    def _step(self, iteration: int, profiler: Profiler) -> Stopped | None:
        run, due, watchdog = self._config.run, self._due, self._watchdog
        watchdog.enter_phase(f"step {iteration}", timeout=run.distributed_timeout_seconds_after_init)
        faults.at("step")
        with profiler.step(iteration):
            step, grad_norm, learning_rate, noted = _finite_step(
                self._config, self._job, self._log, self._taken, due.asked_with(self._signals)
            )
        self._window.add(step)
        if end_phase("first step"):
            self._log.say(describe_start(every_phase=run.verbose))
        is_last, stop = iteration == self._job.train_iters, due.signal_in(noted)
        saves = run.save is not None and (is_last or stop > 0 or due.at(iteration, noted))
        self._log_step(iteration, grad_norm, learning_rate, is_window_end=saves or is_last)
        evaluates = is_last or _is_due(iteration, self._job.eval_interval)
        if evaluates or (saves and not stop and self._monitors.evaluate_before_saving):
            self._evaluate(iteration, f"the evaluation after step {iteration}")
        found = self._monitors.judge(iteration, self._log)
        if found is not None:
            return found
        if saves:
            self._save(iteration, in_background=run.async_save and not (is_last or stop), is_last=is_last)
        else:
            self._saver.poll()
        if saves or is_last:
            # A signal that came while this checkpoint was written needs no second one.
            stop = stop or sync_status(None, self._signals.noted())
            due.restart_clock()
        if stop:
            self._saver.require_last()
            return _stopped(self._config, signal.Signals(stop).name, iteration)
        if saves or self.evaluations.get(iteration):
            self._window.restart_clock()
        return None

    def _log_step(self, iteration: int, grad_norm: float, learning_rate: float, *, is_window_end: bool) -> None:
        """Log the window that ends with this step: at its interval, and at every checkpoint, which holds no sums."""
        if not (is_window_end or _is_due(iteration, self._config.run.log_interval)):
            self._log.advance(iteration)
            return
        metrics = self._window.close() | {"grad_norm": grad_norm, "learning_rate": learning_rate}
        metrics |= self._saver.metrics()
        self._log.step(iteration, self._monitors.step(iteration, metrics, self._taken.pairs))

    def _save(self, iteration: int, *, in_background: bool, is_last: bool) -> None:
        self._watchdog.enter_phase(f"the checkpoint of step {iteration}", timeout=LONG_SECONDS)
        check_replicas(self._job.trainer.chunks, self._job.trainer.groups)
        self._saver.save(
            iteration=iteration,
            consumed_pairs=self._taken.pairs,
            metrics=self.evaluations.get(iteration, {}),
            # What was left out before a resume counts.
            monitors=self._monitors.remembered() | {NUM_SKIPPED: self._taken.num_skipped_steps},
            in_background=in_background,
            is_last=is_last,
        )

    def _evaluate(self, iteration: int, phase: str) -> None:
        """Take the validation metrics under the names they are logged by; none without validation pairs.

        The log-probs of each pair of the first set and the samples of the repetition probe are kept in the run folder.
        """
        self._watchdog.enter_phase(phase, timeout=LONG_SECONDS)
        job, monitors, save = self._job, self._monitors, self._config.run.save
        is_untrained = iteration == 0
        log_probs = (
            self._session.initial_log_probs(job) if is_untrained else validation_log_probs(job.trainer, job.valid_data)
        )
        found = evaluate(job.trainer, job.valid_data, log_probs, is_untrained=is_untrained)
        metrics = self.evaluations[iteration] = monitors.evaluation(iteration, found.metrics)
        if metrics:
            self._log.evaluation(iteration, metrics)
        if found.averages is not None and save is not None and dist.get_rank() == 0:
            try:
                keep_validation_pairs(Path(save), iteration, found.averages, next(iter(job.valid_data.values())))
                if monitors.samples:
                    keep_samples(Path(save), iteration, *zip(*monitors.samples, strict=True))
            except SimPOError as error:
                # Only the report misses them.
                self._log.say(f"WARNING   {error}; the run continues without it")


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
