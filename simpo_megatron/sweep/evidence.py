"""A finished run as evidence: its validation pairs before and after, and the findings that rule it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simpo_megatron.config import Config, load_config
from simpo_megatron.errors import ConfigError
from simpo_megatron.reporting.loggers import CONFIG_FILE, METRICS_FILE
from simpo_megatron.reporting.run_report import read_curves
from simpo_megatron.reporting.validation_pairs import VALIDATION_PAIRS_FILE, ValidationPairs, read_validation_pairs


@dataclass(frozen=True)
class Evidence:
    """One run's log-probs of its validation pairs: averages, nats per token."""

    folder: Path
    config: Config
    pairs: ValidationPairs
    repetition: tuple[float, float] | None
    """Share of repeated 4-grams in greedy continuations before and after; None where it was not probed."""

    @property
    def gaps_P(self) -> np.ndarray:
        """float32 [P]: chosen less rejected, after the run."""
        return self.pairs.after[:, 0] - self.pairs.after[:, 1]

    @property
    def initial_gaps_P(self) -> np.ndarray | None:
        """The same before step 1."""
        return None if self.pairs.before is None else self.pairs.before[:, 0] - self.pairs.before[:, 1]

    @property
    def displacement(self) -> float | None:
        """The change of the chosen responses' mean log-prob since step 0."""
        if self.pairs.before is None:
            return None
        return float((self.pairs.after[:, 0] - self.pairs.before[:, 0]).mean(dtype=np.float64))

    @property
    def length_correlation(self) -> float:
        """Pearson's correlation of the responses' log-probs with their lengths, after the run; 0 where none varies."""
        return _correlation(self.pairs.lengths, self.pairs.after)

    @property
    def findings(self) -> tuple[str, ...]:
        """The reasons that rule the run out, by the limits of its own monitors."""
        limits, found = self.config.monitors, []
        moved, limit = self.displacement, limits.max_displacement
        if moved is not None and limit is not None and not moved >= -limit:
            found.append(f"chosen responses moved by {moved:+.2f} nats per token (max_displacement {limit:g})")
        limit, now = limits.max_length_correlation, self.length_correlation
        before = 0.0 if self.pairs.before is None else _correlation(self.pairs.lengths, self.pairs.before)
        # Only the change since step 0 is the run's effect.
        if limit is not None and abs(now) > max(limit, abs(before)):
            found.append(f"log-probs go with lengths, correlation {now:+.2f} (max_length_correlation {limit:g})")
        limit = limits.max_repetition
        if self.repetition is not None and limit is not None and self.repetition[1] > max(limit, self.repetition[0]):
            found.append(f"{self.repetition[1]:.0%} of 4-grams are repeated (max_repetition {limit:g})")
        return tuple(found)


def read_evidence(folder: Path) -> Evidence:
    """The evidence in the folder of a run.

    Raises: ConfigError when it is none, or kept no validation pairs.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder}: found no {CONFIG_FILE}, expected the folder of a run")
    pairs = read_validation_pairs(folder)
    if pairs is None:
        raise ConfigError(
            f"{folder}: found no {VALIDATION_PAIRS_FILE}, expected a run that evaluated validation pairs; run it again "
            "with --valid-data or --valid-fraction"
        )
    points = read_curves(folder / METRICS_FILE).validation.get("repetition", [])
    return Evidence(
        folder=folder,
        config=load_config(["--config", str(folder / CONFIG_FILE)]),
        pairs=pairs,
        repetition=(points[0][1], points[-1][1]) if len(points) > 1 else None,
    )


def initial_gap(evidence: Mapping[str, tuple[Evidence, ...]]) -> np.ndarray | None:
    """float32 [P]: the gaps that the first of the runs started from, if it kept them."""
    return next((run.initial_gaps_P for runs in evidence.values() for run in runs), None)


def _correlation(lengths: np.ndarray, averages: np.ndarray) -> float:
    x, y = (values.astype(np.float64).ravel() for values in (lengths, averages))
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else 0.0
