"""A dialect's rules applied to the keys of one file: settings, a report, and all obstacles at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from simpo_megatron.config import DEMO, Config
from simpo_megatron.config.options import ALIASES, ALTERNATIVES, Option, cut, find_option
from simpo_megatron.config.reading import Layer, Setting, config_of
from simpo_megatron.errors import ConfigError, Refusals
from simpo_megatron.nemo.keys import Unset
from simpo_megatron.nemo.rules import (
    Asked,
    Dialect,
    Different,
    Differs,
    Ignored,
    Obstacle,
    Only,
    Rule,
    Translated,
    With,
)
from simpo_megatron.nemo.spelling import HOW_TO_GO_ON, Spelling, line
from simpo_megatron.nemo.translation_report import TranslationReport

# Last parts of keys that name classes or calls for another program.
_OBJECTS = ("_target_", "_partial_", "_call_", "_args_", "_convert_", "_recursive_")
_MADE_ELSEWHERE = "names what another program makes an object of"
_NULL = "null, which asks for nothing"
_CLASS = "_target_"


@dataclass(frozen=True)
class Unknown:
    """A key that the dialect does not have; null asks for nothing."""

    instead: str


class _Obstacles(Refusals):
    """The refusals so far, and the lines key=value that resolve them."""

    def raise_those_of(self, path: str) -> None:
        """Raises: ConfigError: the only refusal with its remedy, or the first with the others below, remedies last."""
        if not self.found:
            return
        first, *others = self.found
        remedies = dict.fromkeys(remedy for error in self.found for remedy in getattr(error, "remedies", ()))
        if not others:
            raise Obstacle(f"{first}; add {' '.join(remedies)}" if remedies else str(first), *remedies) from None
        raised = Obstacle(f"{first} (and {len(others)} more, below)", *remedies)
        lines = [f"  {str(error).removeprefix(f'{path}: ')}" for error in others]
        if remedies:
            lines += [HOW_TO_GO_ON, *(f"  {remedy}" for remedy in remedies)]
        raised.details = tuple(lines)
        raise raised from None


def apply(
    dialect: Dialect, values: Mapping[str, Any], path: str, flags: Layer | None = None
) -> tuple[Config, TranslationReport, Spelling]:
    """The configuration that `values` in `dialect` ask for, a report on each key, and how the file spells options.

    An option given under `dialect.simpo` wins over every other key for it; `flags` win over both.

    Raises: ConfigError: unknown keys, unsupported values, keys whose partner is missing, keys that disagree on an
        option, values out of range, or no model or data; `details` names them all.
    """
    obstacles, report = _Obstacles(), TranslationReport(dialect.name, path)
    layer = _simpo_settings(dialect, values, report, obstacles) | (flags or {})
    asked = Asked(values, {name: setting.value for name, setting in layer.items()})
    decided = set(layer).union(*(group for group in ALTERNATIVES if set(group) & set(layer)))
    report.differs.update(dialect.remarks(asked))
    given = [key for key, value in values.items() if value is not None]
    unread = {key.removeprefix(dialect.simpo) for key in given if key.startswith(dialect.simpo)}
    unread = {ALIASES.get(name, name) for name in unread} - set(layer)
    for key, rule in _rules(dialect, values).items():
        with obstacles.collected():
            outcome = _outcome(rule, key, asked, decided, f"{path}: {key}", dialect.simpo)
            _enter(outcome, key, rule, layer, decided, report, dialect.simpo)
            continue
        unread.update(_options_of(rule))
    spelling = Spelling.of(report, layer, flags or {}, dialect.simpo)
    config = _checked(layer, unread, spelling, obstacles)
    _require_inputs(layer, path, dialect.simpo, obstacles)
    obstacles.raise_those_of(path)
    assert config is not None, "what refuses a configuration is an obstacle"
    return config, report, spelling


def _checked(layer: Layer, unread: set[str], spelling: Spelling, obstacles: _Obstacles) -> Config | None:
    """The configuration of `layer`; None where it is refused, which `obstacles` then has.

    What a refusal says of an option among `unread`, whose value was refused before, may be wrong: it is left out.
    """
    refusals = Refusals()
    with refusals.collected():
        return config_of(layer)
    of_read = [error for error in refusals.found if unread.isdisjoint(re.findall(r"[a-z_0-9]+", str(error)))]
    for error in of_read if of_read or obstacles.found else refusals.found:
        remedy = spelling.remedy(error)
        obstacles.found.append(Obstacle(str(error), *([remedy] if remedy else [])))
    return None


def _rules(dialect: Dialect, values: Mapping[str, Any]) -> dict[str, Rule | Unknown]:
    """The rule of every key that is not one of SimPO's own."""
    patterns = sorted((key for key in dialect.table if "*" in key), key=len, reverse=True)
    known = [key for key in dialect.table if "*" not in key]
    rules: dict[str, Rule | Unknown] = {}
    for key in values:
        if key.startswith(dialect.simpo):
            continue
        match = key if key in dialect.table else next((p for p in patterns if fnmatchcase(key, p)), None)
        if match is not None:
            rules[key] = dialect.table[match]
        elif key.split(".")[-1] in _OBJECTS:
            rules[key] = Ignored(_MADE_ELSEWHERE)
        else:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            rules[key] = Unknown(f"expected one of {dialect.name} such as {close!r}; correct it or take it out")
    return rules


def _simpo_settings(
    dialect: Dialect, values: Mapping[str, Any], report: TranslationReport, obstacles: _Obstacles
) -> Layer:
    """The options given by their own names, entered into `report` as well."""
    layer: Layer = {}
    for key, value in values.items():
        if not key.startswith(dialect.simpo):
            continue
        where = f"{report.path}: {key}"
        with obstacles.collected():
            option = find_option(key.removeprefix(dialect.simpo), where)
            if value is None:
                report.ignored[key] = _NULL
                continue
            if isinstance(value, Unset):
                raise Obstacle(f"{where}: found {value.why}, expected {option.expected}", line(key, option))
            if option.name in layer:
                raise Obstacle(
                    f"{where}: {option.name}: found twice, expected once; first in {layer[option.name].where}",
                    f"{key}=null",
                )
            layer[option.name] = _setting(option.name, value, where, key)
            report.taken[key] = _shown(option.name, layer[option.name])
    return layer


def _enter(
    outcome: dict[str, Any] | Different | str,
    key: str,
    rule: Rule | Unknown,
    layer: Layer,
    decided: set[str],
    report: TranslationReport,
    simpo: str,
) -> None:
    """Put an outcome into `layer` and `report`.

    Raises: Obstacle when another key asks for another value of an option.
    """
    if isinstance(outcome, str):
        report.ignored[key] = outcome
        return
    asked_for = outcome.settings if isinstance(outcome, Different) else outcome
    where = f"{report.path}: {key}"
    own = key if isinstance(rule, str) else None
    settings = {
        name: _setting(name, value, where, own or f"{simpo}{name}")
        for name, value in asked_for.items()
        if name not in decided
    }
    for name, setting in settings.items():
        if layer.setdefault(name, setting).value != setting.value:
            raise Obstacle(
                f"{where}: {name}: found {setting.value!r}, and {layer[name].value!r} in {layer[name].where}, expected "
                f"the same; {simpo}{name} decides",
                f"{simpo}{name}={_text(setting.value)}",
            )
    if isinstance(outcome, Different):
        report.differs[key] = outcome.here
    shown = ", ".join(_shown(name, setting) for name, setting in settings.items())
    if not shown:
        report.ignored[key] = outcome.here if isinstance(outcome, Different) else f"{simpo}* decides"
    else:
        (report.taken if isinstance(rule, str) else report.translated)[key] = shown


def _outcome(
    rule: Rule | Unknown, key: str, asked: Asked, decided: set[str], where: str, simpo: str
) -> dict[str, Any] | Different | str:
    """{option: value}, with a difference or without, or the reason why there is none."""
    value = asked.values[key]
    if isinstance(rule, Ignored):
        return rule.reason
    options = _options_of(rule)
    if options and decided.issuperset(options):
        return f"{simpo}* decides"
    if value is None and not (isinstance(rule, Translated) and rule.takes_null):
        return _NULL
    if isinstance(rule, Unknown):
        raise Obstacle(f"{where.removesuffix(key)}found unknown key {key!r}, {rule.instead}", f"{key}=null")
    if isinstance(rule, With):
        return _read_with(rule, key, asked, where)
    if isinstance(rule, Differs):
        return "agrees with what is done here" if value in rule.agreeing else Different(rule.here, {})
    if isinstance(value, Unset):
        wanted = f"; or give {simpo}{options[0]}" if options else ""
        remedy = line(f"{simpo}{options[0]}", find_option(options[0], where)) if options else f"{key}=VALUE"
        raise Obstacle(f"{where}: found {value.why}, expected a value{wanted}", remedy)
    if isinstance(rule, str):
        return {rule: value}
    if isinstance(rule, Only):
        return _only(rule, key, value, where, simpo)
    return _translated(rule, key, asked, where, simpo)


def _options_of(rule: Rule | Unknown) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else getattr(rule, "options", ())


def _read_with(rule: With, key: str, asked: Asked, where: str) -> str:
    """The key that reads this one.

    Raises: Obstacle when the file has none such, and the value asks for something.
    """
    value = asked.values[key]
    for reader in rule.readers:
        for other in asked.values:
            # A null class is no class; any other null switches off the feature of its key.
            if fnmatchcase(other, reader) and not (other.endswith(_CLASS) and asked.values[other] is None):
                return f"read together with {other}"
    if value in rule.idle:
        return "asks for nothing by itself"
    missing = rule.readers[0]
    raise Obstacle(
        f"{where}: found {_text(value)} without {missing}, which it is read with, expected both or none",
        f"{missing}={rule.example}",
    )


def _only(rule: Only, key: str, value: Any, where: str, simpo: str) -> str:
    if value in rule.values:
        return "agrees with what is done here"
    wanted = [_text(entry) for entry in rule.values if entry is not None]
    remedy = f"{key}={wanted[0] if wanted else 'null'}"
    if rule.options:
        remedy = line(f"{simpo}{rule.options[0]}", find_option(rule.options[0], where))
    raise Obstacle(f"{where}: found {_text(value)}, expected {' or '.join(wanted) or 'null'}: {rule.instead}", remedy)


def _translated(rule: Translated, key: str, asked: Asked, where: str, simpo: str) -> dict[str, Any] | Different | str:
    value = asked.values[key]
    try:
        return rule.function(value, replace(asked, reads=rule.reads))
    except (TypeError, ValueError, AttributeError):
        raise Obstacle(f"{where}: found {cut(repr(value))}, expected a value of another kind", f"{key}=null") from None
    except ConfigError as error:
        remedies = getattr(error, "remedies", ())
        if not remedies and len(rule.options) > 1 and rule.example != Translated.example:
            remedies = (f"{key}={rule.example}",)
        elif not remedies:
            remedies = tuple(line(f"{simpo}{name}", find_option(name, where)) for name in rule.options)
        raise Obstacle(f"{where}: {error}", *remedies) from None


def _require_inputs(layer: Layer, path: str, simpo: str, obstacles: _Obstacles) -> None:
    """Note that no key names the model or the data, when there is no demo either."""
    if "preset" in layer and layer["preset"].value == DEMO:
        return
    for name, what in (("model", "the model"), ("data", "the preference files")):
        told = any(
            f"{simpo}{name}=" in remedy for error in obstacles.found for remedy in getattr(error, "remedies", ())
        )
        if name not in layer and not told:
            option = find_option(name, path)
            obstacles.found.append(
                Obstacle(f"{path}: found no key that names {what}, expected {simpo}{name}", line(simpo + name, option))
            )


def _setting(name: str, value: Any, where: str, key: str) -> Setting:
    """The value of the option `name`, which `key` can give.

    Raises: Obstacle when it is of another kind than the option takes.
    """
    option = find_option(name, where)
    try:
        if not option.is_list:
            return Setting(_parse(option, value, where), where)
        items = value if isinstance(value, list | tuple) else [value]
        return Setting(tuple(_parse(option, item, where) for item in items), where)
    except ConfigError as error:
        raise Obstacle(str(error), line(key, option)) from None


def _parse(option: Option, value: Any, where: str) -> Any:
    """A value of YAML's types, checked against the type of the option; text is not a number here either."""
    if isinstance(value, list | dict):
        raise ConfigError(f"{where}: {option.name}: found {cut(repr(value))}, expected {option.expected}")
    return option.parse(_text(value), where, quoted=isinstance(value, str))


def _shown(name: str, setting: Setting) -> str:
    value = setting.value
    return f"{name}={cut(' '.join(map(_text, value)) if isinstance(value, tuple) else _text(value))}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
