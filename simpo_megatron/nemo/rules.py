"""Rules for a dialect's keys: each is taken as an option, translated, read with another, or ignored for a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.keys import Unset


class Obstacle(ConfigError):
    """A key that is not supported, and `remedies`: lines key=value that resolve it."""

    def __init__(self, message: str, *remedies: str) -> None:
        super().__init__(message)
        self.remedies = remedies


@dataclass(frozen=True)
class Ignored:
    """A key without effect here, which does not change what is learned in NeMo either, or which other keys decide."""

    reason: str


@dataclass(frozen=True)
class Differs:
    """A key whose subject works differently here: it is reported, unless its value is among `agreeing`."""

    here: str
    agreeing: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Only:
    """A key whose value must be the one used here anyway, unless one of `options` is given as a SimPO key."""

    values: tuple[Any, ...]
    instead: str
    options: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    """Keys that say more about this one, and nothing without it."""


@dataclass(frozen=True)
class Different:
    """Settings, possibly none, with a slightly different meaning here, which `here` explains."""

    here: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Translated:
    """A key that is translated into `options`, and possibly into others that follow from them.

    `function(value, asked)` returns {option: value}, a Different, or the reason why this value asks for nothing. It
    raises ConfigError for a value without a counterpart. It is not called when all of `options` are given as SimPO
    keys, nor for null unless `takes_null`.
    """

    function: Callable[[Any, Asked], dict[str, Any] | Different | str]
    options: tuple[str, ...]
    reads: tuple[str, ...] = ()
    """All other keys, or patterns of them, that `function` looks at; one without a rule of its own is With this one."""
    example: str = "VALUE"
    """A value of this key, for whoever left it out."""
    takes_null: bool = False


@dataclass(frozen=True)
class With:
    """A key without meaning of its own: one of `readers` reads it, and the file must have that key too.

    Values among `idle` ask for nothing, with or without a reader.
    """

    idle: tuple[Any, ...] = ()
    readers: tuple[str, ...] = ()
    example: str = "VALUE"


Rule = str | Ignored | Differs | Only | Translated | With  # str: the option of the same meaning


@dataclass(frozen=True)
class Dialect:
    """A dialect: how to recognise it, and the rule of each of its keys.

    A key of `table` with a `*` stands for all keys that it matches and that have no rule of their own.
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    """Beginnings of keys; a file is of this dialect when it has keys with all beginnings of one group."""
    table: Mapping[str, Rule]
    simpo: str = "simpo."
    """Beginning of the keys under which each option of ours can be given by its own name."""
    remarks: Callable[[Asked], dict[str, str]] = lambda asked: {}
    """Makes remarks on the file as a whole, by subject."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", _with_partners(self.table))


def _with_partners(table: Mapping[str, Rule]) -> dict[str, Rule]:
    """`table` with a rule for each key that another key's rule reads, and with the readers of each With.

    So no key is silently skipped because the key that would read it is missing from the file.
    """
    complete = dict(table)
    for key, rule in table.items():
        for read in getattr(rule, "reads", ()):
            if read == key:
                continue
            partner = complete.setdefault(read, With())
            assert not isinstance(partner, Ignored), f"{key} reads {read}, which is ignored"
            if isinstance(partner, With):
                example = rule.example if isinstance(rule, Translated) else "true"
                complete[read] = With(partner.idle, (*partner.readers, key), example)
    unread = [key for key, rule in complete.items() if isinstance(rule, With) and not rule.readers]
    assert not unread, f"no rule reads {unread}"
    return complete


@dataclass(frozen=True)
class Asked:
    """All that a file and its overrides say, as the rule sees it that `reads` these keys."""

    values: Mapping[str, Any]
    simpo: Mapping[str, Any]
    reads: tuple[str, ...] = ("*",)

    def get(self, *keys: str) -> Any:
        """The first value that is there and not null among `keys`; None when there is none."""
        for key in keys:
            assert any(fnmatchcase(key, read) for read in self.reads), f"a rule reads {key} and does not say so"
        found = (self.values.get(key) for key in keys)
        return next((value for value in found if value is not None and not isinstance(value, Unset)), None)

    def has(self, pattern: str) -> bool:
        """True when a key that matches `pattern` is there and not null."""
        return any(fnmatchcase(key, pattern) and self.values[key] is not None for key in self.values)

    def below(self, prefix: str) -> dict[str, Any]:
        """The values of the keys that begin with `prefix`, by the rest of their names."""
        found = {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}
        return {name: value for name, value in found.items() if not isinstance(value, Unset)}
