"""A session: the ranks of one command, joined once, for one run or several of one layout in turn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from simpo_megatron import faults, parallel
from simpo_megatron.config import Config
from simpo_megatron.errors import ConfigError
from simpo_megatron.logs import logged
from simpo_megatron.mcore import cpu_patches, device
from simpo_megatron.mcore.userbuffers import userbuffers
from simpo_megatron.stop_signals import StopSignals
from simpo_megatron.training.peers.consistency import check_same, startup_facts
from simpo_megatron.training.peers.meeting import meet
from simpo_megatron.training.peers.telling import errors_told
from simpo_megatron.training.peers.watchdog import Watchdog
from simpo_megatron.training.saving import how_to_continue
from simpo_megatron.training.start.environment import deterministic, prepare_environment
from simpo_megatron.training.start.run_plan import RunPlan, plan_run
from simpo_megatron.training.start.setup import Job, WarmPieces, build_job, warm_pieces
from simpo_megatron.training.start.start_times import end_phase
from simpo_megatron.training.step import LogProbs, validation_log_probs

# The others wait this long for what one rank does alone, such as tokenising.
_GROUP_TIMEOUT_MINUTES = 60.0
LONG_SECONDS = 60 * _GROUP_TIMEOUT_MINUTES
"""Longest time of a phase in which one rank may work for the others."""


@dataclass
class Session:
    """The process groups of this rank, and the state that its runs share."""

    plan: RunPlan
    """The plan of the configuration that the session was opened with."""
    groups: parallel.ParallelGroups
    watchdog: Watchdog
    signals: StopSignals
    told: set[str] = field(default_factory=set)
    """First lines of its runs, which are printed once."""
    _warm: WarmPieces | None = None
    _initial_log_probs: LogProbs | None = None

    def build_job(self, config: Config, plan: RunPlan, *, load_weights: bool) -> Job:
        """The pieces of the run of `config`, as `setup.build_job`, with the model and pairs of the previous run."""
        job = build_job(config, plan, self.groups, load_weights=load_weights, warm=self._warm)
        # FP8 weights give their fp32 masters once, and delayed scales keep a history: such a model is built anew.
        is_kept = config.precision.fp8_recipe != "delayed" and not config.precision.fp8_param_gather
        if self._warm is None and is_kept:
            self._warm = warm_pieces(job)
        return job

    def initial_log_probs(self, job: Job) -> LogProbs:
        """The validation log-probs of `job`, in which no step was taken yet; of the first run, where it is reused.

        Its objective, optimizer and seed change none: adapters that were just drawn add nothing.

        Collectives: those of `validation_log_probs`, the first time.
        """
        if self._initial_log_probs is None:
            found = validation_log_probs(job.trainer, job.valid_data)
            if self._warm is None:
                return found
            self._initial_log_probs = found
        return self._initial_log_probs

    def close(self) -> None:
        """Free what a next run would have reused."""
        self._warm = self._initial_log_probs = None


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """A session of the ranks that were started, if their number fits `config`; a plain process is the only rank.

    Collectives: those of `parallel.initialize` and `check_same`, world.

    Raises:
        SimPOError: a mistake that the user can mend; one in the configuration alone, before any collective.
        PeerFailedError: another rank failed.
    """
    run = config.run
    folder = Path(run.save) / "logs" if run.save is not None and run.log_ranks else None
    prepare_environment(config)
    with logged(run.log_level, rank=int(os.environ.get("RANK", 0)), folder=folder), deterministic(config):
        cpu_patches.install()
        try:
            with StopSignals() as signals, _met_ranks(config, signals) as (plan, watchdog):
                # Before the groups are made: ranks with different layouts would wait for each other there.
                check_same(startup_facts(config))
                groups = parallel.initialize(
                    config.parallel.sizes, backend=device.backend(), timeout_minutes=_GROUP_TIMEOUT_MINUTES
                )
                end_phase("groups")
                session = Session(plan, groups, watchdog, signals)
                try:
                    with userbuffers(config, plan.description.transformer["hidden_size"]):
                        yield session
                finally:
                    session.close()
        except BaseException:
            # Peers may still wait for this rank, so its groups stay; a process that is alone may train again.
            if dist.is_initialized() and dist.get_world_size() == 1:
                parallel.shut_down()
            raise
        parallel.shut_down()


@contextmanager
def _met_ranks(config: Config, signals: StopSignals) -> Iterator[tuple[RunPlan, Watchdog]]:
    """The plan of `config`, and the watchdog of the ranks, once all have arrived."""
    signals.describe_end = lambda: f"stopped between steps; {how_to_continue(config)}"
    with errors_told():
        faults.arm()
        plan = plan_run(config, _num_ranks(config))
    end_phase("plan")
    meeting = meet()
    with Watchdog(meeting, signals) as watchdog:
        parallel.join(device.backend(), _GROUP_TIMEOUT_MINUTES, meeting.store)
        end_phase("rendezvous")
        yield plan, watchdog


def _num_ranks(config: Config) -> int:
    """The number of ranks that were started: torchrun's, or one in a plain process.

    Raises: ConfigError when that is a plain process, and the layout needs more.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    needed = config.parallel.sizes.min_world_size
    if needed > 1:
        raise ConfigError(
            f"ranks: found 1, expected {needed} for this layout (tp, pp, cp, ep); start it with `simpo train`, which "
            "starts them, or with torchrun"
        )
    return 1
