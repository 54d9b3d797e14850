"""The journal of a sweep: an Optuna study in a file that several processes may share, and claims on trials."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from filelock import BaseFileLock

from simpo_megatron.atomic import lock, write_text
from simpo_megatron.config.options import option_table
from simpo_megatron.errors import ConfigError, listed
from simpo_megatron.limits import read_bounded
from simpo_megatron.sweep.points import Point

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

JOURNAL_FILE = "journal.log"
OUTCOME_FILE = "trial.json"
_STUDY, _CLAIMS, _RUNG, _POINT, _SETTINGS = "sweep", ".claims", "rung", "point", "settings"
_WAIT_SECONDS = 120.0
_MAX_OUTCOME_BYTES = 1 << 20

Status = Literal["done", "diverged", "stopped by monitor"]


@dataclass(frozen=True)
class Outcome:
    """The end of a trial, in its folder's `trial.json`."""

    status: Status
    why: str = ""
    accuracy: float | None = None
    """Share of the validation pairs whose chosen response has the higher average log-prob; of a trial that is done."""


@dataclass(frozen=True)
class Claim:
    """A trial that belongs to this process until its result is recorded or the process ends."""

    point: Point
    number: int
    """Optuna's, from 0."""
    held: BaseFileLock


class Journal:
    """The trials of the sweep in `folder`, begun and ended; only rank 0 has it.

    If a process ends during a trial, the next process continues it from the checkpoints in its folder.

    Args:
        settings: the options that all trials share, as JSON values; a sweep continues only under the same ones.

    Raises: ConfigError when Optuna is not installed, the folder cannot be written, or was begun with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        optuna = _optuna()
        self._folder = folder
        try:
            (folder / _CLAIMS).mkdir(parents=True, exist_ok=True)
            with self._alone():
                backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL_FILE))
                self._study = optuna.create_study(
                    study_name=_STUDY,
                    storage=optuna.storages.JournalStorage(backend),
                    direction="maximize",
                    load_if_exists=True,
                )
                before = self._study.user_attrs.get(_SETTINGS, {})
                self._refuse_changes(before, json.loads(json.dumps(settings)))
                self._study.set_user_attr(_SETTINGS, {**before, **settings})
                self._trials(*optuna.trial.TrialState)
        except OSError as error:
            raise ConfigError(f"save: found {folder}, which cannot be written ({error.strerror})") from None
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError) as error:
            raise ConfigError(
                f"save: found {folder / JOURNAL_FILE} ({type(error).__name__}: {error}), expected the readable journal "
                "of a sweep; start the sweep in another folder"
            ) from None

    def _refuse_changes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        # An option that was an axis before, or is one now, differs between trials.
        changed = [
            f"{name} {before[name]!r} before, {now[name]!r} now"
            for name in sorted(before.keys() & now.keys())
            if before[name] != now[name]
        ]
        if changed:
            raise ConfigError(
                f"save: found {self._folder}, a sweep begun with other settings ({listed(changed, 8, '; ')}), expected "
                "the same, for its trials are compared; go on with those or name another folder"
            )

    def outcomes(self) -> dict[Point, Outcome]:
        """The trials that have ended, by their points."""
        from optuna.trial import TrialState

        ended = self._trials(TrialState.COMPLETE, TrialState.FAIL)
        return {point: read_outcome(self._folder / point.folder) for point in ended}

    def take(self, points: Sequence[Point]) -> Claim | None:
        """Claims the first of `points` that has not ended and that no living process works on.

        The point is enqueued in Optuna and asked for, so that Optuna's own tools see an ordinary study.
        """
        from optuna.trial import TrialState

        with self._alone():
            ended = self._trials(TrialState.COMPLETE, TrialState.FAIL)
            running = self._trials(TrialState.RUNNING)
            for point in points:
                held = None if point in ended else self._claim(point)
                if held is not None:
                    left = running.get(point)
                    return Claim(point, self._begin(point, points) if left is None else left.number, held)
        return None

    def tell(self, claim: Claim, outcome: Outcome) -> None:
        """Record how the trial ended, and release its claim."""
        from optuna.trial import TrialState

        run_folder = self._folder / claim.point.folder
        run_folder.mkdir(parents=True, exist_ok=True)
        write_text(run_folder / OUTCOME_FILE, json.dumps(asdict(outcome)) + "\n")
        with self._alone():
            if outcome.accuracy is None:
                self._study.tell(claim.number, state=TrialState.FAIL)
            else:
                self._study.tell(claim.number, outcome.accuracy)
        claim.held.release()

    def _trials(self, *states: Any) -> dict[Point, FrozenTrial]:
        return {_point_of(trial): trial for trial in self._study.get_trials(deepcopy=False, states=states)}

    def _begin(self, point: Point, points: Sequence[Point]) -> int:
        """The number of a new trial of `point`."""
        from optuna.trial import TrialState

        self._study.enqueue_trial(_params(point), user_attrs={_POINT: [list(point.values), point.rung]})
        known = {name: kind for name, kind in _distributions(points).items() if name in _params(point)}
        while True:
            trial = self._study.ask(known)
            if trial.user_attrs[_POINT] == [list(map(list, point.values)), point.rung]:
                return trial.number
            # A process that was killed between the two calls left an enqueued trial that nobody asked for.
            self._study.tell(trial, state=TrialState.PRUNED)

    def _claim(self, point: Point) -> BaseFileLock | None:
        try:
            return lock(self._folder / _CLAIMS / f"{point.folder.replace('/', ' ')}.lock")
        except BlockingIOError:
            return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While the context lasts, no other process changes the journal or looks for a trial."""
        held = lock(self._folder / _CLAIMS / "journal.lock", wait_seconds=_WAIT_SECONDS)
        try:
            yield
        finally:
            held.release()


def read_outcome(run_folder: Path) -> Outcome:
    """The end of the trial in `run_folder`.

    Raises: ConfigError when its file is missing or damaged.
    """
    path = run_folder / OUTCOME_FILE
    try:
        found = Outcome(**json.loads(read_bounded(path, _MAX_OUTCOME_BYTES)))
        is_accuracy = found.accuracy is None or (type(found.accuracy) in (int, float) and 0 <= found.accuracy <= 1)
        if found.status not in get_args(Status) or not isinstance(found.why, str) or not is_accuracy:
            raise ValueError("a value is of another type")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}), expected the end of a trial that the journal knows; start the sweep "
            "in another folder"
        ) from None


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise ConfigError("optuna: found none, expected it for a sweep; pip install 'simpo-megatron[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _point_of(trial: FrozenTrial) -> Point:
    values, rung = trial.user_attrs[_POINT]
    return Point(tuple((name, value) for name, value in values), rung)


def _params(point: Point) -> dict[str, Any]:
    return point.options | ({} if point.rung is None else {_RUNG: point.rung})


def _distributions(points: Sequence[Point]) -> dict[str, BaseDistribution]:
    """The choices of each option, or the range of it that is tried, for Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    every = [_params(point) for point in points]
    found: dict[str, BaseDistribution] = {}
    for name in dict.fromkeys(name for params in every for name in params):
        values = [params[name] for params in every if name in params]
        kind = int if name == _RUNG else option_table()[name].kind
        if kind is float:
            found[name] = FloatDistribution(min(values), max(values), log=name == "lr")
        elif kind is int:
            found[name] = IntDistribution(min(values), max(values))
        else:
            found[name] = CategoricalDistribution(option_table()[name].choices or (False, True))
    return found
