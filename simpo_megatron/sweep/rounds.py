"""The order of a sweep's trials: the whole grid, one option after another, or successive halving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from simpo_megatron.config.reading import Axes
from simpo_megatron.sweep.points import SEED, Point, grid

Choose = Callable[[Sequence[Point]], list[Point]]
"""The settings of finished trials, the best first."""


@dataclass(frozen=True)
class Round:
    """Trials that may be run in any order, before any of the next round."""

    points: tuple[Point, ...]
    is_last: bool


def next_round(rounds: Iterator[Round], ended: Set[Point]) -> Round | None:
    """The first round that has not ended; None after the last one.

    Rounds are computed anew each time, from results alone, so that every process finds the same.
    """
    return next((one for one in rounds if not ended >= set(one.points)), None)


def whole_grid(axes: Axes) -> Iterator[Round]:
    """One round: every combination."""
    yield Round(tuple(grid(axes)), is_last=True)


def staged(axes: Axes, base: Mapping[str, Any], choose: Choose) -> Iterator[Round]:
    """One round per axis, in order: its values, with earlier axes at their best and later ones at their base.

    The base of an axis is the configuration's value if the axis has it, else its first value. Every trial is run with
    each seed.

    Source: the advice of SimPO's authors to tune one option after the other, the learning rate first.
    """
    seeds = {SEED: axes[SEED]} if SEED in axes else {}
    names = [name for name in axes if name != SEED]
    at = {name: (base[name] if base.get(name) in axes[name] else axes[name][0],) for name in names}
    for name in names:
        points = grid({**at, name: axes[name], **seeds})
        yield Round(tuple(points), is_last=name == names[-1])
        best = choose(points)
        if not best:
            return
        at |= {option: (value,) for option, value in best[0].values}


def halving(axes: Axes, factor: int, choose: Choose) -> Iterator[Round]:
    """Rounds of successive halving: each keeps the best 1/`factor` of the last one and trains `factor` times as long.

    Every trial starts from the initial weights with its own complete schedule: a truncated one would favour high
    learning rates. With several seeds, all rounds but the last use only the first seed.
    """
    seeds, without = axes.get(SEED, ()), {name: values for name, values in axes.items() if name != SEED}
    settings = grid(without)
    last = num_rungs(len(settings), factor) - 1
    for rung in range(last + 1):
        of_rung = [[(SEED, seed)] for seed in (seeds if rung == last else seeds[:1])] or [[]]
        points = [replace(one, values=(*one.values, *seed), rung=rung) for one in settings for seed in of_rung]
        yield Round(tuple(points), is_last=rung == last)
        survivors = choose(points)[: math.ceil(len(settings) / factor)]
        settings = [replace(one, rung=None) for one in survivors]
        if not settings:
            return


def num_rungs(num_settings: int, factor: int) -> int:
    """Rounds until one setting or less than `factor` are left."""
    rungs = 1
    while num_settings >= factor:
        num_settings //= factor
        rungs += 1
    return rungs


def rung_steps(train_iters: int, rung: int, last: int, factor: int) -> int:
    """Optimizer steps of a trial of `rung`: all of them in the last one, 1/`factor` of the next in each earlier one."""
    return max(1, train_iters // factor ** (last - rung))
