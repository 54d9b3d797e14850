"""The settings that a sweep tries: axes of values, the points of their grid, and the configuration of each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from simpo_megatron.config.options import find_option, option_table
from simpo_megatron.config.reading import Axes
from simpo_megatron.config.sections import OBJECTIVES
from simpo_megatron.errors import ConfigError

_SECTIONS = ("objective", "optimizer")
SEED, OBJECTIVE = "seed", "objective"


@dataclass(frozen=True)
class Point:
    """One trial of a sweep: its own options."""

    values: tuple[tuple[str, Any], ...]
    """(option, value), in the order of the axes."""
    rung: int | None = None
    """The rung of successive halving, from 0; None where every trial is a whole run."""

    @property
    def name(self) -> str:
        """The name of its folder, such as `lr=1e-06,beta=2`."""
        return ",".join(f"{option}={written(value)}" for option, value in self.values) or "base"

    @property
    def folder(self) -> str:
        """Its folder in that of the sweep."""
        return self.name if self.rung is None else f"rung-{self.rung}/{self.name}"

    @property
    def setting(self) -> Point:
        """The point without its seed: the setting that is compared with others."""
        return replace(self, values=tuple(pair for pair in self.values if pair[0] != SEED))

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.values)


def written(value: Any) -> str:
    """The shortest text that reads as `value` again."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def parse_axes(texts: Sequence[str]) -> Axes:
    """The axes of texts such as `lr=5e-7,1e-6`.

    Raises: ConfigError for an option that does not exist, a value of a wrong type, or an option given twice.
    """
    axes: Axes = {}
    for text in texts:
        name, equals, values = text.partition("=")
        where = f"sweep: {text}"
        if not equals or not values:
            raise ConfigError(f"sweep: found {text[:60]!r}, expected an option and its values, as in lr=5e-7,1e-6")
        option = find_option(name.strip().removeprefix("--").replace("-", "_"), where)
        if option.name in axes:
            raise ConfigError(f"{where}: found {option.name} twice, expected all its values in one place")
        axes[option.name] = tuple(option.parse(value.strip(), where) for value in values.split(","))
    return axes


def check_axes(axes: Axes) -> None:
    """Return if every axis can change within one set of ranks, model and pairs.

    Raises: ConfigError naming the option that cannot, an axis without values, or one with a value twice.
    """
    if not axes:
        raise ConfigError("sweep: found no axis, expected values to try, as in --sweep lr=5e-7,1e-6 beta=2,2.5,10")
    for name, values in axes.items():
        option = option_table()[name]
        if (option.section not in _SECTIONS and name != SEED) or option.is_list:
            raise ConfigError(
                f"sweep: found {name}, expected an option of the objective or the optimizer, or seed; {name} would "
                "change the ranks, the model or the pairs, so start a run of its own for each value"
            )
        if len(set(values)) < len(values):
            raise ConfigError(f"sweep: found a value of {name} twice, expected each once")


def grid(axes: Axes) -> list[Point]:
    """Every combination of the axes' values, the last axis varying fastest.

    An objective takes only the axes that it has options for; combinations that then agree are one point.
    """
    names = list(axes)
    points = [_point(dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*axes.values())]
    return list(dict.fromkeys(points))


def _point(values: Mapping[str, Any]) -> Point:
    kept = values
    if OBJECTIVE in values:
        own = _options_of(values[OBJECTIVE])
        of_objectives = set().union(*map(_options_of, OBJECTIVES))
        kept = {name: value for name, value in values.items() if name in own or name not in of_objectives}
    return Point(tuple(kept.items()))


def _options_of(objective: str) -> set[str]:
    """The options that an objective has, by each of their names."""
    own = {entry.name for entry in fields(OBJECTIVES[objective]) if entry.init}
    return own | ({"gamma"} if "gamma_beta_ratio" in own else set())
