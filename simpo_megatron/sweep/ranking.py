"""The ranking of settings: accuracy and gap of the same validation pairs, and the differences that chance explains.

Rewards, margins and losses are never compared: they are beta times the gap, shifted by gamma. Accuracy is the share of
pairs whose chosen response has the higher average log-prob. It and the gap, in nats per token, mean the same for every
setting and every objective.

Shapes: K settings, S seeds, P pairs, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 4000
CONFIDENCE = 0.95
_RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it with CONFIDENCE."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """One setting among others, by the same pairs."""

    accuracy: Interval
    gap: Interval
    """Nats per token."""
    behind: float
    """Accuracy of the best less its own."""
    chance: float
    """The most that it could be behind by chance alone, were it the best in truth."""

    @property
    def is_level(self) -> bool:
        """True when the best is not shown to be better."""
        # Both are multiples of one pair's share, rounded.
        return self.behind <= self.chance + 1e-9


def standings(gaps_KSP: np.ndarray, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> list[Standing]:
    """The standing of each of K settings; the one with the highest accuracy is the best.

    A bootstrap resamples pairs, the same ones for every setting, and seeds if there are several. A setting is level
    with the best unless it trails by more than chance alone would let any setting lead it in 95 of 100 resamples.
    So the truly best setting is among the level ones 95 times of 100, whatever the number of settings.

    Args:
        gaps_KSP: average log-prob of chosen less that of rejected, nats per token, of the same pairs in one order.

    Source: multiple comparisons with the best (Hsu, Annals of Statistics 9, 1981), with the bootstrap's distribution.
    """
    right_KSP = (gaps_KSP > 0).astype(np.float64)
    accuracy_BK, gap_BK = _resampled_means((right_KSP, gaps_KSP.astype(np.float64)), seed, num_resamples)
    accuracy_K, gap_K = right_KSP.mean((1, 2)), gaps_KSP.mean((1, 2), dtype=np.float64)
    shifts_BK = accuracy_BK - accuracy_K
    best = accuracy_K.max()
    found = []
    for k in range(len(gaps_KSP)):
        ahead_B = (shifts_BK - shifts_BK[:, k : k + 1]).max(1)
        found.append(
            Standing(
                accuracy=_interval(accuracy_K[k], accuracy_BK[:, k]),
                gap=_interval(gap_K[k], gap_BK[:, k]),
                behind=float(best - accuracy_K[k]),
                chance=float(np.quantile(ahead_B, CONFIDENCE)),
            )
        )
    return found


def _resampled_means(values: Sequence[np.ndarray], seed: int, num_resamples: int) -> list[np.ndarray]:
    """[B, K] means of each of `values` [K, S, P] over pairs and seeds drawn with replacement, the same for all."""
    num_settings, num_seeds, num_pairs = values[0].shape
    draw = np.random.default_rng(seed)
    means: list[list[np.ndarray]] = [[] for _ in values]
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        pairs_BP = draw.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=count) / num_pairs
        seeds_BS = draw.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count) / num_seeds
        for of_value, value_KSP in zip(means, values, strict=True):
            of_seeds = (pairs_BP @ value_KSP.reshape(-1, num_pairs).T).reshape(count, num_settings, num_seeds)
            of_value.append(np.einsum("bks,bs->bk", of_seeds, seeds_BS))
    return [np.concatenate(of_value) for of_value in means]


def _interval(mean: float, resampled_B: np.ndarray) -> Interval:
    low, high = np.quantile(resampled_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(mean), float(low), float(high))
