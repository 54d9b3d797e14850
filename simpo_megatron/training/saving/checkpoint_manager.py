"""The checkpoints of a run, saved one at a time; each is committed once every rank has written its share."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from simpo_megatron import faults
from simpo_megatron.atomic import draft_of
from simpo_megatron.checkpoint import manifest, retention
from simpo_megatron.checkpoint.run_config import write_run_config
from simpo_megatron.checkpoint.save_strategy import SaveStrategy
from simpo_megatron.checkpoint.sharded_state import FailedAloneError
from simpo_megatron.checkpoint.writer import Writing, begin_write
from simpo_megatron.config import Config
from simpo_megatron.convert.folder import copy_model_files, write_config
from simpo_megatron.errors import CheckpointError, NumericsError
from simpo_megatron.limits import read_bounded
from simpo_megatron.mcore.hf import hub_name
from simpo_megatron.mcore.precision import parameter_dtype
from simpo_megatron.ranks import on_first_rank, sync_status
from simpo_megatron.reporting.loggers import METRICS_FILE, RunLog
from simpo_megatron.training.peers.watchdog import Watchdog
from simpo_megatron.training.saving.resume import describe_run
from simpo_megatron.training.start.setup import Job

_MAX_METRICS = 1 << 28


@dataclass(frozen=True)
class _Draft:
    """A checkpoint that is not committed yet."""

    folder: Path
    iteration: int
    facts: Mapping[str, Any]
    writing: Writing
    began: float
    """Seconds of time.perf_counter."""
    waited_seconds: float
    """Seconds that training stood still for it so far."""


class Saver:
    """Saves a run; at most one checkpoint is written in the background while training goes on.

    Use as a context manager. At its end, a checkpoint in the background is committed; after an error that other
    ranks may not know of, it is dropped. Every rank does the same in the same order.
    """

    def __init__(self, config: Config, job: Job, log: RunLog, watchdog: Watchdog) -> None:
        self._config, self._job, self._log, self._watchdog = config, job, log, watchdog
        self._draft: _Draft | None = None
        self._goes_on, self._is_last = config.run.on_save_failure == "continue", False
        self._num_failed = 0
        self._failure: CheckpointError | None = None
        self._strategy = SaveStrategy(job.trainer.groups.dp_cp)

    def save(
        self,
        *,
        iteration: int,
        consumed_pairs: int,
        metrics: Mapping[str, float],
        monitors: Mapping[str, Any],
        in_background: bool,
        is_last: bool = False,
    ) -> None:
        """Save the run after `iteration` steps; once committed, older checkpoints may be deleted.

        A checkpoint in the background is finished first.

        Args:
            metrics: the latest metrics, those of validation under `eval/`; they decide which checkpoint is best.
            monitors: the state of the monitors, JSON values.
            in_background: return as soon as training may go on; `poll` and `finish` commit.
            is_last: no step follows. A failure then waits for `require_last`, and the model is exported before.

        Collectives: megatron's for saving, those of `begin_write`, and of two `on_first_rank`, world.

        Raises:
            CheckpointError: on every rank alike, unless `is_last`, or `on_save_failure` is `continue`; the checkpoints
                before this one are as they were.
            FailedAloneError: on this rank.
        """
        self._is_last = is_last
        self.finish()
        facts = {
            **describe_run(self._config, self._job),
            "consumed_pairs": consumed_pairs,
            "epoch": consumed_pairs / len(self._job.train_data),
            "metrics": {name: value for name, value in metrics.items() if abs(value) < float("inf")},
            "monitors": dict(monitors),
        }
        with self._survived(iteration):
            self._draft = self._begin(iteration, facts, in_background=in_background)
        if not in_background:
            self.finish()

    def poll(self) -> None:
        """Commit the checkpoint in the background if every rank has written its share; called after each step.

        Collectives: while there is one, one all-reduce of 32 bytes, world; those of `finish` once it is written.
        """
        if self._draft is not None and not sync_status(None, int(self._draft.writing.is_under_way())):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in the background, if there is one, and commit it.

        Collectives: those of `Writing.finish`, and of two `on_first_rank`, world.

        Raises:
            CheckpointError, FailedAloneError: as `save`.
        """
        draft, self._draft = self._draft, None
        if draft is None:
            return
        with self._survived(draft.iteration, draft.writing.num_bytes):
            started = time.perf_counter()
            folder, num_bytes = self._commit(draft)
            now = time.perf_counter()
            self._log.say(
                f"saved     {folder} ({num_bytes / 2**20:.1f} MiB in {now - draft.began:.1f} s; "
                f"training waited {draft.waited_seconds + now - started:.1f} s)"
            )

    def metrics(self) -> dict[str, float]:
        """The number of checkpoints that could not be written, where the run goes on without them."""
        return {"failed_saves": self._num_failed} if self._goes_on else {}

    def require_last(self, exported: str | None = None) -> None:
        """Return if the last checkpoint could be written, in a run that went on when one could not.

        Args:
            exported: the folder that has the trained model, if one has.

        Raises:
            CheckpointError: it could not, on every rank alike.
        """
        if self._failure is not None:
            kept = "" if exported is None else f"; the trained model is in {exported}"
            raise type(self._failure)(f"{self._failure}{kept}") from self._failure

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._draft is None:
            return
        # A loss that is not finite was told to all ranks, and what is under way was saved before it.
        if error is not None and not isinstance(error, NumericsError):
            self._drop(self._draft)
            return
        self._watchdog.enter_phase(f"the end of the checkpoint of step {self._draft.iteration}", timeout=float("inf"))
        self._goes_on |= error is not None
        self.finish()

    def _drop(self, draft: _Draft) -> None:
        """Delete `draft`. Its writer ends by itself; the next start removes what that still leaves."""
        self._log.say(f"WARNING   dropped the checkpoint of step {draft.iteration}, which was not written yet")
        if dist.get_rank() == 0:
            shutil.rmtree(draft.folder, ignore_errors=True)

    def _begin(self, iteration: int, facts: Mapping[str, Any], *, in_background: bool) -> _Draft:
        save, job = self._save, self._job
        began = time.perf_counter()
        folder = on_first_rank(lambda: manifest.create_draft(save, iteration), wrap=CheckpointError)
        with _whole_or_removed(folder):
            faults.at("save")
            on_first_rank(lambda: _add_small_files(save, folder, job), wrap=CheckpointError)
            writing = begin_write(job.trainer.state, iteration, folder, self._strategy, in_background=in_background)
        waited = time.perf_counter() - began
        return _Draft(folder, iteration, facts, writing, began, waited)

    def _commit(self, draft: _Draft) -> tuple[Path, int]:
        """(the committed folder, its size in bytes), on every rank."""
        with _whole_or_removed(draft.folder):
            shards = draft.writing.finish()

            def seal() -> tuple[Path, int]:
                small = {path.name for path in draft.folder.iterdir()} - shards.keys()
                files = {**shards, **{name: manifest.digest_file(draft.folder / name) for name in sorted(small)}}
                checkpoint = manifest.commit_draft(draft.folder, draft.iteration, files, draft.facts, synced=shards)
                # Not the checkpoint: its files are as many as ranks, and each rank would get them.
                return checkpoint.folder, checkpoint.num_bytes

            committed = on_first_rank(seal, wrap=CheckpointError)
        on_first_rank(lambda: retention.delete_old(self._save, self._config.run.keep_checkpoints), wrap=CheckpointError)
        return committed

    @property
    def _save(self) -> Path:
        assert self._config.run.save is not None, "a run without a folder is not saved"
        return Path(self._config.run.save)

    @contextmanager
    def _survived(self, iteration: int, num_bytes: int | None = None) -> Iterator[None]:
        """Report and count a failed save, where the run goes on without the checkpoint."""
        try:
            yield
            self._failure = None
        except CheckpointError as error:
            needed = "" if num_bytes is None else f", {num_bytes / 2**30:.2f} GiB needed"
            told = type(error)(f"no checkpoint of step {iteration} ({_free(self._save)}{needed}): {error}")
            if isinstance(error, FailedAloneError) or not (self._goes_on or self._is_last):
                raise told from error
            self._num_failed += 1
            # Ranks may have come to different places of it.
            self._strategy = SaveStrategy(self._job.trainer.groups.dp_cp)
            self._failure = told
            then = "ends without it" if self._is_last else f"goes on ({self._num_failed} not saved so far)"
            self._log.say(f"WARNING   {told}; the run {then}")


def _free(save: Path) -> str:
    """The free bytes in the folder `save`, which may be gone."""
    try:
        return f"{shutil.disk_usage(save).free / 2**30:.2f} GiB free"
    except OSError as error:
        return f"{save}: {error.strerror}"


@contextmanager
def _whole_or_removed(folder: Path) -> Iterator[None]:
    """Removes the draft in `folder` when it cannot be written."""
    try:
        yield
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _add_small_files(save: Path, folder: Path, job: Job) -> None:
    """The metrics so far, and the model's other files: configuration, tokenizer, chat template."""
    metrics = b""
    # If metrics cannot be read, only a later report misses them.
    with suppress(OSError):
        metrics = read_bounded(save / METRICS_FILE, _MAX_METRICS)
    if metrics:
        (folder / METRICS_FILE).write_bytes(metrics)
    copy_model_files(
        job.plan.sources.model,
        folder,
        flat=True,
        chat_template=job.chat_template,
        tokenizer_folder=job.plan.sources.tokenizer,
    )
    write_config(folder, job.plan.description.hf_config)
    config = job.plan.config
    if config.lora.lora_rank is None:
        write_run_config(
            folder,
            job.plan.description,
            place=folder.with_name(str(draft_of(folder))),
            dtype=parameter_dtype(config.precision),
            hub_id=hub_name(str(config.model.model)),
            sizes=config.parallel.sizes,
        )
