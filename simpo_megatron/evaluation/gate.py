"""A gate by Arena-Hard, closed for a model that is worse than another by more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simpo_megatron.errors import DataError

_NUM_RESAMPLES, _SEED = 10_000, 42
_LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The difference of two win rates against the same baseline, in points, with its 95 % interval."""

    value: float
    low: float
    high: float
    num_questions: int

    def is_worse(self, margin: float) -> bool:
        """True when the whole interval lies more than `margin` points below 0."""
        return self.high < -margin

    def __str__(self) -> str:
        return (
            f"{self.value:+.1f} points ({self.low:+.1f} to {self.high:+.1f}, 95 %, {self.num_questions} questions in "
            "pairs)"
        )


def paired_difference(ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> Difference:
    """The difference between two models' battles, by a bootstrap over the questions that both have answered.

    A resample takes a question's battles of both models together, so the difficulty of a question cancels. The
    random numbers are seeded: the same battles give the same interval.

    Args:
        ours: `uid` and `scores` of each question, from 0 for a battle lost to 1 for one won.

    Raises: DataError where the models were not judged on the same questions.
    """
    by_uid = [{row["uid"]: row["scores"] for row in rows} for rows in (ours, others)]
    shared = sorted(by_uid[0].keys() & by_uid[1].keys())
    if not shared or 2 * len(shared) < max(map(len, by_uid)):
        raise DataError(
            f"against: found {len(shared)} questions judged in both folders, of {len(by_uid[0])} and {len(by_uid[1])}, "
            "expected at least half of them; judge the same questions in both"
        )
    # float64 [2, Q]: won battles and battles of each question.
    won_Q = np.array([[sum(rows[uid]) for uid in shared] for rows in by_uid], dtype=np.float64)
    num_Q = np.array([[len(rows[uid]) for uid in shared] for rows in by_uid], dtype=np.float64)
    drawn = np.random.default_rng(_SEED).integers(0, len(shared), (_NUM_RESAMPLES, len(shared)))
    rates = won_Q[:, drawn].sum(-1) / num_Q[:, drawn].sum(-1)
    whole = won_Q.sum(-1) / num_Q.sum(-1)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(100 * (rates[0] - rates[1]), [tail, 1 - tail])
    return Difference(float(100 * (whole[0] - whole[1])), float(low), float(high), len(shared))
