"""Monitors: warn, from a run's metrics, of the failures that training without a reference model can lead to.

They read log lines and evaluations, not single microbatches, and never change training. Their state is kept in
checkpoints, so that a resumed run warns as the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch.distributed as dist

from simpo_megatron.checkpoint import manifest
from simpo_megatron.config import Config
from simpo_megatron.data.batching import step_pairs
from simpo_megatron.data.ngrams import repetition
from simpo_megatron.errors import ConfigError, StoppedByMonitor
from simpo_megatron.ranks import sync_status
from simpo_megatron.reporting.loggers import RunLog
from simpo_megatron.reporting.metric_names import EVALUATION_PREFIX
from simpo_megatron.training.repetition import first_prompts, greedy_samples
from simpo_megatron.training.saving import CHOSEN, LINES, PAIRS, REPETITION_AT_START, START, TOLD, Start
from simpo_megatron.training.start.setup import Job

DISPLACEMENT = EVALUATION_PREFIX + "logps/chosen_displacement"
REPETITION = EVALUATION_PREFIX + "repetition"
_CHOSEN = EVALUATION_PREFIX + "logps/chosen"
_MEDIAN_DISTANCE_TO_DEVIATION = 1.4826
_SMALLEST_DEVIATION = 0.01
_BY_VALIDATION = {"displacement", "repetition"}
_MAX_SHOWN = 16
_MAX_TEXT = 100


@dataclass(frozen=True)
class Alarm:
    """A finding of a monitor, in words."""

    monitor: str
    text: str
    iteration: int
    num_sound_steps: int
    """After so many steps the model was not under suspicion yet."""


def spike_limit(losses: Sequence[float], num_deviations: float) -> float:
    """The loss that lies `num_deviations` robust standard deviations above the median of `losses`.

    A deviation is 1.4826 times the median distance from the median, which for a normal distribution is the standard
    deviation. It is at least 0.01 (the loss of a saturated pair) and at least a hundredth of the median. So losses that
    hardly vary, or are nearly 0, give no false alarm.
    """
    middle = median(losses)
    deviation = _MEDIAN_DISTANCE_TO_DEVIATION * median(abs(loss - middle) for loss in losses)
    return middle + num_deviations * max(deviation, _SMALLEST_DEVIATION * max(1.0, abs(middle)))


def is_beyond(values: Sequence[float], limit: float) -> bool:
    """True when the median of `values` is above `limit` or below `-limit`."""
    return abs(median(values)) > limit


class Monitors:
    """The monitors of a run, on every rank alike.

    Args:
        start: where the run starts, with the saved result of `remembered()`.

    Raises:
        ConfigError: `stop_on` names a monitor of validation pairs, and there are none.
    """

    def __init__(self, config: Config, job: Job, start: Start) -> None:
        self._config, self._job, self._settings = config, job, config.monitors
        remembered = start.monitors
        if self.evaluate_before_saving and not job.valid_data:
            raise ConfigError(
                f"stop_on: found {' '.join(self._settings.stop_on)}, expected validation pairs; add --valid-data "
                "or --valid-fraction"
            )
        self._lines = {name: deque(remembered.get(name, ()), maxlen=self._settings.monitor_window) for name in LINES}
        self._told: set[str] = set(remembered.get(TOLD, ()))
        self._start: dict[str, Any] | None = remembered.get(START)
        self._logged_steps, self._logged_pairs = start.iteration, start.consumed_pairs
        self._alarms: list[Alarm] = []
        self._prompts = None
        self.samples: list[tuple[str, str]] = []
        """The repetition probe's prompts and continuations in the latest evaluation; none where it is off."""
        if self._settings.repetition_prompts and job.valid_data:
            first_set = next(iter(job.valid_data.values()))
            self._prompts = first_prompts(first_set, self._settings.repetition_prompts, job.trainer.groups)

    @property
    def evaluate_before_saving(self) -> bool:
        """True when validation comes before a checkpoint is saved."""
        return not _BY_VALIDATION.isdisjoint(self._settings.stop_on)

    def step(self, iteration: int, metrics: Mapping[str, float], consumed_pairs: int) -> dict[str, Any]:
        """`metrics` of the log line after `iteration`; if its loss is a spike, with the `pair_ids` of its steps."""
        record: dict[str, Any] = dict(metrics)
        settings = self._settings
        losses = self._lines["loss"]
        if settings.max_loss_spike is not None and self._is_long_enough(losses):
            limit = spike_limit(losses, settings.max_loss_spike)
            # A NaN loss fails this comparison too.
            if not metrics["loss"] <= limit:
                record["pair_ids"] = self._pairs_until(consumed_pairs)
                places = self._job.train_data.places(record["pair_ids"], _MAX_SHOWN)
                text = _spike_text(metrics["loss"], limit, losses, places)
                # The first loss of the window is of the model before its first step.
                self._alarms.append(Alarm("loss_spike", text, iteration, self._logged_steps - 1))
        for name, values in self._lines.items():
            if math.isfinite(metrics.get(name, math.nan)):
                values.append(metrics[name])
        self._watch_level(iteration, "saturated", "{:.0%} of the pairs are saturated, with hardly a gradient left")
        self._watch_level(iteration, "length_correlation", "rewards go with response lengths, correlation {:+.2f}")
        self._logged_steps, self._logged_pairs = iteration, consumed_pairs
        return record

    def evaluation(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """`metrics` of an evaluation, with what the monitors add to those of the first set.

        Collectives: those of `greedy_samples`, where the repetition probe is on.
        """
        if _CHOSEN not in metrics:
            return dict(metrics)
        return {**metrics, **self._displacement(iteration, metrics), **self._repetition(iteration)}

    def _displacement(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The change of the average log-prob of chosen responses since step 0, where that is known."""
        pairs = next(iter(self._job.valid_data.values())).fingerprint
        if iteration == 0 and math.isfinite(metrics[_CHOSEN]):
            self._start = {CHOSEN: metrics[_CHOSEN], PAIRS: pairs}
        if self._start is None or self._start[PAIRS] != pairs:
            return {}
        moved, limit = metrics[_CHOSEN] - self._start[CHOSEN], self._settings.max_displacement
        self._tell_once(
            iteration,
            "displacement",
            limit is not None and not moved >= -limit,
            f"chosen validation responses have {moved:+.3f} nats per token since step 0 (max_displacement {limit})",
        )
        return {DISPLACEMENT: moved}

    def _repetition(self, iteration: int) -> dict[str, float]:
        """The mean repetition of greedy continuations, where the probe is on."""
        if self._prompts is None:
            return {}
        samples = greedy_samples(
            self._job.trainer,
            self._prompts.ids,
            num_tokens=self._settings.repetition_tokens,
            end_ids=self._prompts.end_ids,
            vocab_size=self._job.plan.description.vocab_size,
        )
        decode = self._job.tokenizer.loaded.decode
        texts = (map(decode, ids) for ids in (self._prompts.ids, samples))
        self.samples = list(zip(*texts, strict=True))
        share, limit = fmean(map(repetition, samples)), self._settings.max_repetition
        if self._start is not None:
            # Only a rise since step 0 is training's effect; base models repeat themselves a lot.
            at_start = self._start.setdefault(REPETITION_AT_START, share if iteration == 0 else 0.0)
            limit = limit and max(limit, at_start)
        worst = decode(max(samples, key=repetition))[:_MAX_TEXT]
        self._tell_once(
            iteration,
            "repetition",
            limit is not None and share > limit,
            f"{share:.0%} of 4-grams in greedy continuations are repeated (limit {limit}), as in {worst!r}",
        )
        return {REPETITION: share}

    def remembered(self) -> dict[str, Any]:
        """The state that a checkpoint has to keep, as JSON values."""
        lines = {name: list(values) for name, values in self._lines.items()}
        return {**lines, TOLD: sorted(self._told), START: self._start}

    def judge(self, iteration: int, log: RunLog) -> StoppedByMonitor | None:
        """Print new alarms; returns why the run must end before this step is saved, if `stop_on` asks for it.

        Collectives: one all-reduce of 32 bytes, world, where `stop_on` names any; every rank ends with the first.
        """
        alarms, self._alarms = self._alarms, []
        for alarm in alarms:
            log.say(f"WARNING {alarm.monitor} after step {alarm.iteration}: {alarm.text}")
        stopping = [alarm for alarm in alarms if alarm.monitor in self._settings.stop_on]
        if not self._settings.stop_on or not sync_status(None, int(bool(stopping) and dist.get_rank() == 0)):
            return None
        kept = self._last_checkpoint_within(min((alarm.num_sound_steps for alarm in stopping), default=0))
        found = "; ".join(f"{alarm.monitor}: {alarm.text}" for alarm in stopping)
        return StoppedByMonitor(f"{found}; stopped after step {iteration}, which was not saved; {kept}")

    def _last_checkpoint_within(self, num_steps: int) -> str:
        save = self._config.run.save
        saved = {} if save is None else {manifest.iteration_of(path): path for path in manifest.committed(Path(save))}
        sound = [iteration for iteration in saved if iteration <= num_steps]
        if not sound:
            return "there is no checkpoint from before; start anew with a lower lr"
        last = max(sound)
        return (
            f"the last checkpoint from before is {saved[last]}; to go on from there with a lower lr, add "
            f"--resume {last} --override-on-resume"
        )

    def _is_long_enough(self, values: Sequence[float]) -> bool:
        return len(values) >= max(2, self._settings.monitor_window // 4)

    def _watch_level(self, iteration: int, monitor: str, text: str) -> None:
        values, limit = self._lines[f"rewards/{monitor}"], getattr(self._settings, f"max_{monitor}")
        if limit is None or not self._is_long_enough(values):
            return
        told = text.format(median(values)) + f", median of {len(values)} log lines (max_{monitor} {limit:g})"
        self._tell_once(iteration, monitor, is_beyond(values, limit), told)

    def _tell_once(self, iteration: int, monitor: str, is_beyond_limit: bool, text: str) -> None:
        """An alarm when the limit is crossed; the next one only after the value has returned below it."""
        if is_beyond_limit and monitor not in self._told:
            self._alarms.append(Alarm(monitor, text, iteration, iteration - 1))
            self._told.add(monitor)
        elif not is_beyond_limit:
            self._told.discard(monitor)

    def _pairs_until(self, consumed_pairs: int) -> list[int]:
        """The pairs of the steps since the last log line, in order of their numbers."""
        num_pairs, options = len(self._job.train_data), self._job.trainer.batch_options
        starts = range(self._logged_pairs, consumed_pairs, options.global_batch_size)
        return sorted(int(pair) for start in starts for pair in step_pairs(num_pairs, start, options))


def _spike_text(loss: float, limit: float, losses: Sequence[float], places: str) -> str:
    return (
        f"the loss is {loss:.4f}, above {limit:.4f}, with a median of {median(losses):.4f} in the {len(losses)} log "
        f"lines before; pairs {places}; their numbers in this run are in metrics.jsonl"
    )
