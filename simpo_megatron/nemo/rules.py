"""Rules for a dialect's keys: each is taken as an option, translated, or ignored for a reason; no others pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from simpo_megatron.config.options import EXCLUSIVE, Option, find_option
from simpo_megatron.config.reading import Layer, Setting
from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.keys import Unset

# Ends of keys by which a file names classes and calls for another program to make.
_OBJECTS = ("_target_", "_partial_", "_call_", "_args_", "_convert_", "_recursive_")
_MADE_ELSEWHERE = "names what another program makes an object of"
_NULL = "null, which asks for nothing"


@dataclass(frozen=True)
class Ignored:
    """A key without effect here."""

    reason: str


@dataclass(frozen=True)
class Only:
    """A key that has to agree with what is done here anyway, unless one of `options` is given as a SimPO key."""

    values: tuple[Any, ...]
    instead: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Translated:
    """A key that says `options`, and perhaps what follows from them, in other words.

    `function(value, asked)` returns {option: value}, or the reason why this value asks for nothing. It raises
    ConfigError for a value that has no counterpart. It is not asked when all of `options` are given as SimPO keys.
    """

    function: Callable[[Any, Asked], dict[str, Any] | str]
    options: tuple[str, ...]


Rule = str | Ignored | Only | Translated  # str: the option of the same meaning


@dataclass(frozen=True)
class Dialect:
    """One way of writing a configuration: how to know it, and what each of its keys becomes.

    A key of `table` with a `*` in it stands for all keys it matches that are not there by themselves.
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    """Beginnings of keys; a file is of this dialect when it has keys with all beginnings of one group."""
    table: Mapping[str, Rule]
    simpo: str = "simpo."
    """Beginning of the keys under which each option of ours can be given by its own name."""


@dataclass(frozen=True)
class Asked:
    """All that a file and its overrides say."""

    values: Mapping[str, Any]
    simpo: Mapping[str, Any]

    def get(self, *keys: str) -> Any:
        """The first value that is there and not null among `keys`; None when there is none."""
        found = (self.values.get(key) for key in keys)
        return next((value for value in found if value is not None and not isinstance(value, Unset)), None)


@dataclass(frozen=True)
class TranslationReport:
    """The fate of every key of a file, by key."""

    dialect: str
    path: str
    taken: dict[str, str] = field(default_factory=dict)
    """The option that was given the value as it stands, as `option=value`."""
    translated: dict[str, str] = field(default_factory=dict)
    """The settings it was translated to, as `option=value, option=value`."""
    ignored: dict[str, str] = field(default_factory=dict)
    """The reason."""

    def lines(self) -> list[str]:
        """For the reader: a summary, then one line per taken or translated key and one per reason to ignore keys."""
        counts = f"{len(self.taken)} taken, {len(self.translated)} translated, {len(self.ignored)} ignored"
        lines = [f"{self.path}: {self.dialect} configuration, keys: {counts}"]
        lines += [f"  taken       {key} -> {setting}" for key, setting in self.taken.items()]
        lines += [f"  translated  {key} -> {settings}" for key, settings in self.translated.items()]
        reasons: dict[str, list[str]] = {}
        for key, reason in self.ignored.items():
            reasons.setdefault(reason, []).append(key)
        return lines + [f"  ignored     {' '.join(keys)}: {reason}" for reason, keys in reasons.items()]


def apply(dialect: Dialect, values: Mapping[str, Any], path: str) -> tuple[Layer, TranslationReport]:
    """The settings that `values` ask for in `dialect`, and what became of each key.

    An option given under `dialect.simpo` wins over every other key that speaks of it.

    Raises: ConfigError for an unknown key, a value that cannot be had here, or two keys that differ on an option.
    """
    rules, report = _rules(dialect, values, path), TranslationReport(dialect.name, path)
    layer = _simpo_settings(dialect, values, report)
    asked = Asked(values, {name: setting.value for name, setting in layer.items()})
    decided = set(layer).union(*(group for group in EXCLUSIVE if set(group) & set(layer)))
    for key, rule in rules.items():
        outcome = _outcome(rule, values[key], asked, decided, f"{path}: {key}", dialect.simpo)
        if isinstance(outcome, str):
            report.ignored[key] = outcome
            continue
        settings = {
            name: _setting(name, value, f"{path}: {key}") for name, value in outcome.items() if name not in decided
        }
        for name, setting in settings.items():
            if layer.setdefault(name, setting).value != setting.value:
                raise ConfigError(
                    f"{setting.where}: {name}: found {setting.value!r}, and {layer[name].value!r} in "
                    f"{layer[name].where}, expected the same; {dialect.simpo}{name} decides"
                )
        group = report.taken if isinstance(rule, str) else report.translated
        group[key] = ", ".join(_shown(name, setting) for name, setting in settings.items())
    return layer, report


def _rules(dialect: Dialect, values: Mapping[str, Any], path: str) -> dict[str, Rule]:
    """The rule of every key that is not one of SimPO's own."""
    patterns = sorted((key for key in dialect.table if "*" in key), key=len, reverse=True)
    rules, unknown = {}, []
    for key in values:
        if key.startswith(dialect.simpo):
            continue
        match = key if key in dialect.table else next((p for p in patterns if fnmatchcase(key, p)), None)
        if match is not None:
            rules[key] = dialect.table[match]
        elif key.split(".")[-1] in _OBJECTS:
            rules[key] = Ignored(_MADE_ELSEWHERE)
        else:
            unknown.append(key)
    if unknown:
        known = [key for key in dialect.table if "*" not in key]
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)[0]
        others = f" (and of {', '.join(unknown[1:5])}{', ...' if len(unknown) > 5 else ''})" if unknown[1:] else ""
        raise ConfigError(
            f"{path}: found unknown key {unknown[0]!r}, expected one of {dialect.name} such as {close!r}; "
            f"correct it or take it out{others}, or give an option of this program as {dialect.simpo}OPTION"
        )
    return rules


def _simpo_settings(dialect: Dialect, values: Mapping[str, Any], report: TranslationReport) -> Layer:
    """The options given by their own names, entered into `report` as well."""
    layer: Layer = {}
    for key, value in values.items():
        if not key.startswith(dialect.simpo):
            continue
        where = f"{report.path}: {key}"
        option = find_option(key.removeprefix(dialect.simpo), where)
        if value is None:
            report.ignored[key] = _NULL
            continue
        if isinstance(value, Unset):
            raise ConfigError(f"{where}: found {value.why}, expected {option.expected}")
        if option.name in layer:
            raise ConfigError(f"{where}: {option.name}: found twice, first in {layer[option.name].where}")
        layer[option.name] = _setting(option.name, value, where)
        report.taken[key] = _shown(option.name, layer[option.name])
    return layer


def _outcome(rule: Rule, value: Any, asked: Asked, decided: set[str], where: str, simpo: str) -> dict[str, Any] | str:
    """{option: value}, or the reason why there is none."""
    if isinstance(rule, Ignored):
        return rule.reason
    options = (rule,) if isinstance(rule, str) else rule.options
    if options and decided.issuperset(options):
        return f"{simpo}* decides"
    if value is None:
        return _NULL
    if isinstance(value, Unset):
        wanted = f"; or give {simpo}{options[0]}" if options else ""
        raise ConfigError(f"{where}: found {value.why}, expected a value{wanted}")
    if isinstance(rule, str):
        return {rule: value}
    if isinstance(rule, Only):
        if value in rule.values:
            return "agrees with what is done here"
        expected = " or ".join(_text(entry) for entry in rule.values if entry is not None) or "null"
        raise ConfigError(f"{where}: found {_text(value)}, expected {expected}: {rule.instead}")
    try:
        return rule.function(value, asked)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _setting(name: str, value: Any, where: str) -> Setting:
    option = find_option(name, where)
    if not option.is_list:
        return Setting(_parse(option, value, where), where)
    items = value if isinstance(value, list | tuple) else [value]
    return Setting(tuple(_parse(option, item, where) for item in items), where)


def _parse(option: Option, value: Any, where: str) -> Any:
    """A value of YAML's types, held to what the option takes; text is not a number here either."""
    return option.parse(_text(value), where, quoted=isinstance(value, str))


def _shown(name: str, setting: Setting) -> str:
    value = setting.value
    return f"{name}={' '.join(map(_text, value)) if isinstance(value, tuple) else _text(value)}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
