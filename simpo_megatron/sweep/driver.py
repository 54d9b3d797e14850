"""The sweep's driver: runs trials in turn on one set of ranks, each an ordinary run, and writes the results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from simpo_megatron.atomic import remove_folder
from simpo_megatron.checkpoint import manifest
from simpo_megatron.config import num_train_iters
from simpo_megatron.errors import ConfigError, NumericsError, StoppedByMonitor, StoppedBySignal, visible
from simpo_megatron.ranks import on_first_rank, raise_on_all_ranks
from simpo_megatron.sweep.comparison import Ranking, compare
from simpo_megatron.sweep.evidence import Evidence, read_evidence
from simpo_megatron.sweep.journal import Claim, Journal, Outcome
from simpo_megatron.sweep.page import PAGE_FILE, lines, write_results
from simpo_megatron.sweep.points import Point
from simpo_megatron.sweep.request import Sweep
from simpo_megatron.sweep.rounds import Round, next_round
from simpo_megatron.training.loop import run_in
from simpo_megatron.training.peers.consistency import check_same
from simpo_megatron.training.session import LONG_SECONDS, Session, open_session
from simpo_megatron.training.start.run_plan import plan_run
from simpo_megatron.training.start.run_tokenizer import share_tokenizer
from simpo_megatron.training.start.setup import load_data

_POLL_SECONDS = 5.0


@dataclass(frozen=True)
class _Turn:
    """The next thing that all ranks do."""

    kind: Literal["run", "wait", "end"]
    point: Point | None = None
    train_iters: int | None = None
    """The steps of a trial that is shorter than its configuration says."""


def run_sweep(sweep: Sweep) -> None:
    """Run the unfinished trials of `sweep` on the ranks that were started, and write the results.

    Raises:
        SimPOError: an error that is not a trial's own result; the same command continues from there.
        StoppedBySignal: on every rank alike, after a whole step and a checkpoint of the current trial.
    """
    with open_session(sweep.base) as session:
        check_same({"sweep": repr(sweep)})
        stopped = _Driver(sweep, session).run()
    if stopped is not None:
        raise stopped


class _Driver:
    """The trials on the ranks of `session`; rank 0 alone keeps the journal and reads results."""

    def __init__(self, sweep: Sweep, session: Session) -> None:
        self._sweep, self._session = sweep, session
        self._is_first = dist.get_rank() == 0
        self._journal = raise_on_all_ranks(lambda: Journal(sweep.folder, sweep.settings) if self._is_first else None)
        self._claim: Claim | None = None
        self._full_steps = self._count_steps()
        if self._journal is not None and (ended := self._journal.outcomes()):
            _say(f"resume    {len(ended)} trials of {sweep.folder} have ended already")

    def _count_steps(self) -> int:
        """The optimizer steps of a whole trial, if the sweep has shorter ones; else 0, unused."""
        if self._sweep.halving is None:
            return 0
        config, sources = self._sweep.base, self._session.plan.sources
        train_data, _ = load_data(config, sources, share_tokenizer(sources.tokenizer, config.pairs))
        return num_train_iters(config, len(train_data))

    def run(self) -> StoppedBySignal | None:
        """Runs all turns; returns the stop by a signal, if one came. The journal has the results of trials."""
        while True:
            self._session.watchdog.enter_phase("the choice of the next trial", timeout=LONG_SECONDS)
            turn = on_first_rank(self._next_turn)
            if turn.kind == "end":
                return None
            if turn.kind == "wait":
                time.sleep(_POLL_SECONDS)
                continue
            ended = self._run_trial(turn)
            if isinstance(ended, StoppedBySignal):
                return ended
            self._note(ended)

    def _next_turn(self) -> _Turn:
        """The next turn, on the rank that has the journal."""
        assert self._journal is not None, "rank 0 has the journal"
        ended = self._journal.outcomes()
        one = next_round(self._rounds(ended), set(ended))
        if one is None:
            _say(*lines(self._write(ended)), f"page      {self._sweep.folder / PAGE_FILE}")
            return _Turn("end")
        self._claim = self._journal.take(one.points)
        if self._claim is None:
            return self._turn_without_trial(one, ended)
        point = self._claim.point
        num_ended = sum(known in ended for known in one.points)
        _say(f"trial     {num_ended + 1} of {len(one.points)}: {point.folder}")
        return _Turn("run", point, self._sweep.steps_of(point, self._full_steps))

    def _turn_without_trial(self, one: Round, ended: dict[Point, Outcome]) -> _Turn:
        if not self._sweep.shared:
            raise ConfigError(
                f"save: found trials of {self._sweep.folder} in work by another process, expected none; wait for it, "
                "or add --array to each process to share the sweep"
            )
        if one.is_last:
            _say("trial     none is left to start; other processes are at work on the rest")
            return _Turn("end")
        return _Turn("wait")

    def _run_trial(self, turn: _Turn) -> Outcome | StoppedBySignal:
        assert turn.point is not None
        config = self._sweep.config_of(turn.point, turn.train_iters)
        plan = plan_run(config, dist.get_world_size())
        try:
            stopped, _ = run_in(self._session, plan)
        except NumericsError as error:
            return Outcome("diverged", str(error))
        if isinstance(stopped, StoppedBySignal):
            return stopped
        if isinstance(stopped, StoppedByMonitor):
            return Outcome("stopped by monitor", str(stopped))
        return Outcome("done")

    def _note(self, outcome: Outcome) -> None:
        """Record the trial's result in the journal, and write the results so far.

        Collectives: that of `raise_on_all_ranks`, world.
        """
        raise_on_all_ranks(lambda: self._note_here(outcome, self._journal))

    def _note_here(self, outcome: Outcome, journal: Journal | None) -> None:
        if journal is None:
            return
        assert self._claim is not None, "a trial was taken"
        point = self._claim.point
        if outcome.status == "done":
            gaps_P = read_evidence(self._sweep.folder / point.folder).gaps_P
            outcome = Outcome("done", accuracy=float((gaps_P > 0).mean()))
            _say(f"trial     {point.folder}: accuracy {outcome.accuracy:.1%} by average log-prob")
        else:
            _say(f"WARNING   trial {point.folder} {outcome.status}: {outcome.why}")
        journal.tell(self._claim, outcome)
        self._claim = None
        self._write(journal.outcomes())

    def _rounds(self, ended: dict[Point, Outcome]) -> Iterator[Round]:
        def choose(points: Sequence[Point]) -> list[Point]:
            by_name = {point.setting.name: point.setting for point in points}
            rows = self._compared(points, ended).rows
            return [by_name[row.name] for row in rows if not row.ruled_out]

        return self._sweep.rounds(choose)

    def _compared(self, points: Sequence[Point], ended: dict[Point, Outcome]) -> Ranking:
        """The settings of `points` whose trials have all ended."""
        settings: dict[str, tuple[Evidence, ...]] = {}
        options, failed = {}, {}
        for setting, group in groupby(sorted(points, key=lambda one: one.setting.name), lambda one: one.setting):
            of_setting = list(group)
            if not set(of_setting) <= ended.keys():
                continue
            options[setting.name] = setting.options
            bad = [(point, ended[point]) for point in of_setting if ended[point].status != "done"]
            if bad:
                of_seed = {point: f"{point.name} " if len(of_setting) > 1 else "" for point, _ in bad}
                failed[setting.name] = "; ".join(f"{of_seed[point]}{end.status}: {end.why}" for point, end in bad)
            else:
                settings[setting.name] = tuple(read_evidence(self._sweep.folder / one.folder) for one in of_setting)
        return compare(settings, options=options, failed=failed)

    def _write(self, ended: dict[Point, Outcome]) -> Ranking:
        """Writes and returns the ranking so far; deletes checkpoints that `keep` does not ask for."""
        begun: list[Round] = []
        for one in self._rounds(ended):
            if ended.keys() & set(one.points):
                begun.append(one)
            if not ended.keys() >= set(one.points):
                break
        # Only whole runs are compared; the trials of a staged sweep are all whole.
        counted = begun[-1:] if self._sweep.halving else begun
        points = dict.fromkeys(point for one in counted for point in one.points)
        found = self._compared(list(points), ended)
        if self._sweep.keep is not None:
            # A setting with unfinished seeds may still become the best.
            judged = {row.name for row in found.rows[self._sweep.keep :]} | found.failed.keys()
            kept = {point.folder for point in points if point.setting.name not in judged}
            self._remove_checkpoints(self._sweep.folder / one.folder for one in ended if one.folder not in kept)
        shorter = begun[:-1] if self._sweep.halving else []
        earlier = {self._title(number, one): self._compared(one.points, ended) for number, one in enumerate(shorter)}
        try:
            write_results(self._sweep.folder, found, self._sweep.axes, earlier)
        except StoppedBySignal:
            raise
        except Exception as error:
            # The trials are whole, and the next that ends, or the same command, writes the results again.
            _say(f"WARNING   no {PAGE_FILE} was written: {type(error).__name__}: {error}")
        return found

    def _title(self, number: int, one: Round) -> str:
        steps = self._sweep.steps_of(one.points[0], self._full_steps)
        return f"Round {number + 1} of {self._sweep.num_rungs}: {steps:,} steps each"

    def _remove_checkpoints(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            for checkpoint in manifest.committed(folder):
                # Another process of the sweep may be removing the same folder.
                with suppress(OSError):
                    remove_folder(checkpoint)


def _say(*told: str) -> None:
    print(*map(visible, told), sep="\n", flush=True)
