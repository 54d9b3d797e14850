"""Settings compared: the best one, those level with it, those ruled out, and how much chance explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simpo_megatron.errors import ConfigError
from simpo_megatron.sweep.evidence import Evidence, initial_gap
from simpo_megatron.sweep.ranking import Standing, standings

GAP_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Row:
    """One setting: its runs, one for each seed, and its standing."""

    name: str
    options: Mapping[str, Any]
    runs: tuple[Evidence, ...]
    standing: Standing
    """Among the settings that nothing rules out; of one that is ruled out, by itself."""
    ruled_out: tuple[str, ...] = ()
    is_best: bool = False

    @property
    def verdict(self) -> str:
        if self.ruled_out:
            return "ruled out"
        if self.is_best:
            return "best"
        return "level with the best" if self.standing.is_level else "behind"

    @property
    def displacement(self) -> float | None:
        """The change of the chosen responses' log-prob, mean over seeds."""
        found = [run.displacement for run in self.runs if run.displacement is not None]
        return float(np.mean(found)) if found else None

    @property
    def length_correlation(self) -> float:
        return float(np.mean([run.length_correlation for run in self.runs]))

    @property
    def repetition(self) -> float | None:
        found = [run.repetition[1] for run in self.runs if run.repetition is not None]
        return float(np.mean(found)) if found else None

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each seed."""
        return [float((run.gaps_P > 0).mean()) for run in self.runs]


@dataclass(frozen=True)
class Ranking:
    """The settings, the best first, then by accuracy; those that are ruled out last."""

    rows: tuple[Row, ...]
    failed: Mapping[str, str]
    """Settings without a result, and why."""
    num_pairs: int
    initial_gaps_P: np.ndarray | None
    against_start: Standing | None
    """The initial model, held against the best setting as if it were another one."""

    @property
    def best(self) -> Row | None:
        return self.rows[0] if self.rows and not self.rows[0].ruled_out else None

    @property
    def level(self) -> list[Row]:
        """The settings that the best is not shown to be better than, without itself."""
        return [row for row in self.rows[1:] if not row.ruled_out and row.standing.is_level]

    @property
    def headline(self) -> str:
        """One sentence on which setting to take, and how sure that is."""
        best = self.best
        if best is None:
            return "No setting is left to choose: each failed or is ruled out."
        accuracy, names = best.standing.accuracy, [row.name for row in self.level]
        parts = [
            f"{best.name} is the best of {len(self.rows) + len(self.failed)}: {accuracy.mean:.1%} of "
            f"{self.num_pairs:,} validation pairs are right (95 % interval {accuracy.low:.1%} to {accuracy.high:.1%})"
        ]
        if names:
            parts.append(f"level with it: {'; '.join(names)}")
        elif len(self.rows) > 1:
            parts.append("no other is level with it")
        start = self.against_start
        if start is not None:
            what = "no better than" if start.is_level else "better than"
            parts.append(f"it is {what} the model it started from ({start.accuracy.mean:.1%})")
        return ". ".join(part[0].upper() + part[1:] if place else part for place, part in enumerate(parts)) + "."

    def beyond(self, ratio: float) -> float | None:
        """Share of the pairs whose gap was above `ratio`, nats per token, before any training."""
        return None if self.initial_gaps_P is None else float((self.initial_gaps_P > ratio).mean())


def compare(
    settings: Mapping[str, tuple[Evidence, ...]],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    failed: Mapping[str, str] | None = None,
) -> Ranking:
    """The comparison of `settings`: {name: runs}, the same number of runs for each.

    Raises: ConfigError when two runs were not evaluated on the same pairs.
    """
    _check_same_pairs([run for runs in settings.values() for run in runs])
    ruled_out = {name: tuple(dict.fromkeys(f for run in runs for f in run.findings)) for name, runs in settings.items()}
    eligible = [name for name in settings if not ruled_out[name]]
    found = dict(zip(eligible, _standings([settings[name] for name in eligible]), strict=True))
    for name in settings:
        if ruled_out[name]:
            found[name] = _standings([settings[name]])[0]
    rows = [
        Row(name, (options or {}).get(name, {}), runs, found[name], ruled_out[name]) for name, runs in settings.items()
    ]
    rows.sort(key=lambda row: (bool(row.ruled_out), -row.standing.accuracy.mean, -row.standing.gap.mean))
    if eligible:
        rows[0] = replace(rows[0], is_best=True)
    initial = initial_gap(settings)
    best = rows[0] if eligible else None
    return Ranking(
        rows=tuple(rows),
        failed=failed or {},
        num_pairs=len(rows[0].runs[0].pairs.after) if rows else 0,
        initial_gaps_P=initial,
        against_start=None if best is None or initial is None else _against_start(best.runs, initial),
    )


def _standings(settings: Sequence[tuple[Evidence, ...]]) -> list[Standing]:
    if not settings:
        return []
    return standings(np.stack([np.stack([run.gaps_P for run in runs]) for runs in settings]))


def _against_start(best: tuple[Evidence, ...], initial_P: np.ndarray) -> Standing | None:
    trained = np.stack([run.gaps_P for run in best])
    return standings(np.stack([trained, np.broadcast_to(initial_P, trained.shape)]))[1]


def _check_same_pairs(runs: Sequence[Evidence]) -> None:
    for run in runs[1:]:
        if run.pairs.fingerprint != runs[0].pairs.fingerprint:
            raise ConfigError(
                f"{run.folder}: found other validation pairs than in {runs[0].folder}, expected the same, tokenised "
                "alike; evaluate both on one file"
            )
