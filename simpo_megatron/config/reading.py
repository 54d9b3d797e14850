"""Config from defaults < preset < YAML < command line; a refusal names the file and line, or the flag."""

from __future__ import annotations

import argparse
import os
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from simpo_megatron.config.bundled import find_config_file
from simpo_megatron.config.flags import flag_names, make_parser, short_help
from simpo_megatron.config.options import (
    ALTERNATIVES,
    Option,
    cut,
    find_option,
    nearest,
    option_table,
    refuse_both,
)
from simpo_megatron.config.presets import PRESETS
from simpo_megatron.config.python_values import python_value
from simpo_megatron.config.sections import DEMO, OBJECTIVES, Config
from simpo_megatron.config.yaml_tree import PLAIN_TAG, read_yaml_tree
from simpo_megatron.errors import ConfigError, Refusals, require

_COMMAND_LINE = "command line"
_SECTIONS_OF_NEMO = ("dpo", "policy", "checkpointing", "trainer", "exp_manager", "train", "scheduler")
_DEFAULT_OBJECTIVE = next(iter(OBJECTIVES))


@dataclass(frozen=True)
class Setting:
    """A value that was set, and where it was set."""

    value: typing.Any
    where: str


Layer = dict[str, Setting]

SWEEP_KEY = "sweep"
"""The key of a YAML file under which stand the values that `simpo sweep` tries."""
Axes = dict[str, tuple[typing.Any, ...]]
"""Values to try, by option."""


def load_config(argv: Sequence[str] | None = None, *, axes: Axes | None = None, **options: typing.Any) -> Config:
    """The checked configuration of a command line, or of `options` given in python.

    Without a model, a preset or a file it is the preset `demo`. `--help` and `--help-all` print and exit with 0.

    Args:
        argv: a command line; sys.argv's arguments when neither it nor options are given.
        axes: filled with the values to try under `sweep` in the file; None: a file with `sweep` is refused.
        options: values under the options' names or aliases, above `argv`: `load_config(preset="demo", lr=1e-3)`;
            `config` names a file, as `--config` does.

    Raises: ConfigError naming the file and line, the flag or the option.
    """
    if argv is None:
        argv = [] if options else sys.argv[1:]
    command_line, config_file = _read_command_line(list(argv))
    config_file = options.pop("config", config_file)
    yaml_file: Layer = {}
    if config_file is not None:
        yaml_file = read_yaml(find_config_file(os.path.expanduser(config_file)), axes)
    asked = _merge(_merge(yaml_file, command_line), _layer_of(options, "load_config"))
    if config_file is None and not asked.keys() & {"preset", "model", "data"}:
        asked["preset"] = Setting(DEMO, "default")
    return _build(_merge(_preset_layer(asked), asked))


def config_from(**options: typing.Any) -> Config:
    """A configuration from python values under the options' names (or aliases), for programs and tests."""
    return config_of(_layer_of(options, "config_from"))


def _layer_of(options: typing.Mapping[str, typing.Any], where: str) -> Layer:
    """The settings of python values under options' names or aliases.

    Raises: ConfigError for an unknown name, a value of a wrong type, or two names of one thing.
    """
    found = {name: find_option(name, where) for name in options}
    layer = {option.name: Setting(python_value(option, options[name], where), where) for name, option in found.items()}
    refuse_both({name: setting.where for name, setting in layer.items()})
    return layer


def config_of(layer: Layer) -> Config:
    """The configuration of the settings in `layer`, above those of the preset they may name."""
    refuse_both({name: setting.where for name, setting in layer.items()})
    return _build(_merge(_preset_layer(layer), layer))


def read_yaml(path: str | Path, axes: Axes | None = None) -> Layer:
    """The settings of a YAML file, which is one flat mapping from option names to values.

    Only `sweep` may hold a mapping, from options to the values to try, which goes to `axes`, or is refused without it.

    Only the syntax tree is read: tags have no effect and nothing is constructed or imported. Aliases cannot multiply,
    because values do not nest.

    Raises: ConfigError for anything else: duplicate or unknown keys, tags, nesting, wrong types, tabs.
    """
    layer: Layer = {}
    refusals = Refusals()
    for key, value in _yaml_items(Path(path)):
        with refusals.collected():
            _read_yaml_item(key, value, path, layer, axes)
    with refusals.collected():
        refuse_both({name: setting.where for name, setting in layer.items()})
    refusals.raise_any()
    return layer


def _read_yaml_item(key: yaml.Node, value: yaml.Node, path: str | Path, layer: Layer, axes: Axes | None) -> None:
    """Put a key's value into `layer`, or into `axes` what stands under `sweep`."""
    where = f"{path}:{key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode) or not key.tag.startswith(PLAIN_TAG + "str"):
        raise ConfigError(f"{where}: found a key that is not a plain name, expected an option such as lr")
    if isinstance(value, yaml.MappingNode) and key.value in typing.get_type_hints(Config):
        raise ConfigError(f"{where}: {key.value}: found a section, expected its options without it, not indented")
    if key.value == SWEEP_KEY:
        if axes is None:
            raise ConfigError(
                f"{where}: {SWEEP_KEY}: found values to try, expected the options of one run; start them with "
                "simpo sweep"
            )
        axes |= _yaml_axes(value, path, where)
        return
    if isinstance(value, yaml.MappingNode) and key.value in _SECTIONS_OF_NEMO:
        raise ConfigError(
            f"{where}: {key.value}: found a section, expected options of a run; --nemo-config reads NeMo files"
        )
    option = find_option(key.value, where)
    if option.name in layer:
        raise ConfigError(f"{where}: {key.value}: found twice, expected once; first in {layer[option.name].where}")
    layer[option.name] = Setting(_yaml_value(value, option, where), where)


def _yaml_axes(node: yaml.Node, path: str | Path, where: str) -> Axes:
    """The values to try by option."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{where}: {SWEEP_KEY}: found no mapping, expected lines such as 'lr: [5e-7, 1e-6]' under it")
    axes: Axes = {}
    for key, values in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        option = find_option(str(key.value), where)
        items = values.value if isinstance(values, yaml.SequenceNode) else [values]
        axes[option.name] = tuple(_yaml_scalar(item, option, where) for item in items)
    return axes


def _yaml_items(path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    _, root = read_yaml_tree(path)
    if root is None:
        raise ConfigError(f"{path}: found an empty file, expected lines such as 'lr: 5e-7'")
    if not isinstance(root, yaml.MappingNode) or root.tag != PLAIN_TAG + "map":
        kind = getattr(root, "id", "document")
        raise ConfigError(f"{path}:{root.start_mark.line + 1}: found a {kind}, expected lines such as 'lr: 5e-7'")
    return root.value


def _yaml_value(node: yaml.Node, option: Option, where: str) -> typing.Any:
    if not option.is_list:
        return _yaml_scalar(node, option, where)
    is_list = isinstance(node, yaml.SequenceNode) and node.tag == PLAIN_TAG + "seq"
    return tuple(_yaml_scalar(item, option, where) for item in (node.value if is_list else [node]))


def _yaml_scalar(node: yaml.Node, option: Option, where: str) -> typing.Any:
    tag = node.tag.removeprefix(PLAIN_TAG)
    if isinstance(node, yaml.ScalarNode) and re.fullmatch("str|int|float|bool|null|timestamp", tag):
        return option.parse(node.value, where, quoted=node.style is not None)
    found = {"seq": "a list", "map": "a mapping"}.get(tag, f"the tag {node.tag[:60]}")
    raise ConfigError(f"{where}: {option.name}: found {found}, expected {option.expected}")


def _read_command_line(argv: list[str]) -> tuple[Layer, str | None]:
    layer, given = _parse_flags(argv)
    if hasattr(given, "nemo_config"):
        raise ConfigError(
            f"{_COMMAND_LINE}: found --nemo-config, expected a file of --config; simpo train reads NeMo's"
        )
    if hasattr(given, "explain_config"):
        raise ConfigError(f"{_COMMAND_LINE}: found --explain-config, expected --nemo-config FILE with it")
    return layer, getattr(given, "config", None)


def read_nemo_command_line(argv: list[str]) -> tuple[Layer, str, list[str], bool]:
    """(settings of the flags, the NeMo file, what follows it, whether only an explanation is asked for).

    Raises: ConfigError for a flag that is wrong, and for a file of ours beside the one of NeMo.
    """
    layer, given = _parse_flags(argv, takes_words=True)
    if hasattr(given, "config"):
        raise ConfigError(f"{_COMMAND_LINE}: found both --config and --nemo-config, expected one of them")
    file, *words = given.nemo_config
    return layer, file, [*words, *given.words], hasattr(given, "explain_config")


def _parse_flags(argv: list[str], *, takes_words: bool = False) -> tuple[Layer, argparse.Namespace]:
    """The settings of the options' flags, and all that was given; its `words` are key=value before or after flags."""
    parser = make_parser()
    given, unknown = parser.parse_known_args(argv)
    if hasattr(given, "help") or hasattr(given, "help_all"):
        print(parser.format_help() if hasattr(given, "help_all") else short_help())
        sys.exit(0)
    given.words = [word for word in unknown if takes_words and not word.startswith("--")]
    others = [word.split("=")[0] for word in unknown if word not in given.words]
    refusals = Refusals()
    # What follows an unknown flag may be its value.
    for flag in [word for word in others if word.startswith("--")] or others[:1]:
        meant = nearest(flag, flag_names())
        refusals.found.append(
            ConfigError(f"{_COMMAND_LINE}: found unknown argument {flag[:60]!r}, expected an option{meant}")
        )
    layer: Layer = {}
    for name, value in vars(given).items():
        option = option_table().get(name)
        if option is None:  # --config and others that are no option of a run
            continue
        with refusals.collected():
            if option.is_list:
                value = tuple(option.parse(text, _COMMAND_LINE) for text in value)
            elif option.kind is not bool:
                value = option.parse(value, _COMMAND_LINE)
            layer[name] = Setting(value, _COMMAND_LINE)
    with refusals.collected():
        refuse_both({name: setting.where for name, setting in layer.items()})
    refusals.raise_any()
    return layer, given


def _preset_layer(asked: Layer) -> Layer:
    """The settings of the preset that `asked` names, if it names one."""
    name = asked["preset"].value if "preset" in asked else None
    if name is None:
        return {}
    if name not in PRESETS:
        raise ConfigError(
            f"{asked['preset'].where}: preset: found {cut(name)!r}, expected a preset's name{nearest(name, PRESETS)}"
        )
    options = PRESETS[name].options
    if "objective" in asked and asked["objective"].value != options.get("objective", _DEFAULT_OBJECTIVE):
        # The constants of one objective mean nothing for another.
        options = {key: value for key, value in options.items() if option_table()[key].section != "objective"}
    return {option: Setting(value, f"preset {name}") for option, value in options.items()}


def _merge(lower: Layer, upper: Layer) -> Layer:
    """`upper` over `lower`; an option in `upper` removes the other options of its group from `lower`.

    Exports that `lower` has below its `save` go below that of `upper`: runs saved apart would export onto each other.
    """
    displaced = {name for group in ALTERNATIVES if any(name in upper for name in group) for name in group}
    kept = {name: setting for name, setting in lower.items() if name not in displaced}
    if "save" in lower and "save" in upper and upper["save"].value is not None:
        for name in kept.keys() & {"export_hf", "export_adapter"}:
            path = Path(str(kept[name].value))
            if path.is_relative_to(str(lower["save"].value)):
                moved = Path(upper["save"].value) / path.relative_to(lower["save"].value)
                kept[name] = replace(kept[name], value=str(moved))
    return kept | upper


def _build(layer: Layer) -> Config:
    """The sections from their defaults and `layer`; a section's error gets the place where its value was set.

    Raises: ConfigError: every option that its section refuses; without it, the next one of the section is looked for.
    """
    sections, refusals = {}, Refusals()
    for section in typing.get_type_hints(Config):
        own = {name: setting for name, setting in layer.items() if option_table()[name].section == section}
        sections[section] = _section(section, own, refusals)
    refusals.raise_any()
    return Config(**sections)


def _section(section: str, settings: Layer, refusals: Refusals) -> typing.Any:
    """The section of `settings`; None after refusals, which are added to `refusals`."""
    section_type, left_out = typing.get_type_hints(Config)[section], set[str]()
    while True:
        try:
            own = dict(settings)
            if section == "objective":
                section_type = _objective_type(own)
            made = section_type(**_field_values(own))
            return None if left_out else made
        except ConfigError as error:
            words = re.findall(r"[a-z_0-9]+", str(error))
            blamed = next((name for name in words if name in settings), None)
            if blamed is None and len(settings) == 1:
                blamed = next(iter(settings))
            # What is left may miss what was taken out.
            if left_out.isdisjoint(words):
                place = "" if blamed is None else f"{settings[blamed].where}: "
                refusals.found.append(ConfigError(f"{place}{error}"))
            if blamed is None:
                return None
            left_out.add(blamed)
            settings = {name: setting for name, setting in settings.items() if name != blamed}


def _objective_type(settings: Layer) -> type:
    """The class of the objective that `settings` name, the name taken out of them.

    Raises: ConfigError for an option that only another objective has.
    """
    asked = settings.pop("objective", Setting(_DEFAULT_OBJECTIVE, "default"))
    name = option_table()["objective"].parse(asked.value, asked.where)
    options = [entry.name for entry in fields(OBJECTIVES[name]) if entry.init]
    second_names = ["gamma"] if "gamma_beta_ratio" in options else []
    for key in settings:
        if key not in options + second_names:
            expected = f"an option that {name} has: {', '.join(options)}"
            raise ConfigError(f"{key}: found with objective {name}, expected {expected}")
    return OBJECTIVES[name]


def _field_values(settings: Layer) -> dict[str, typing.Any]:
    """The values set for one section's fields; alternative options are converted to the main one."""
    values = {name: setting.value for name, setting in settings.items()}
    if "fp32" in values:
        values["bf16"] = not values.pop("fp32")
    if "chat_template_kwargs" in values:
        values["chat_template_args"] = values.pop("chat_template_kwargs")
    if "gamma" in values:
        gamma, beta = values.pop("gamma"), values.get("beta", option_table()["beta"].default)
        require(gamma >= 0, "gamma", gamma, "a number not below 0")
        require(beta > 0, "beta", beta, "a number above 0")
        values["gamma_beta_ratio"] = gamma / beta
    return values
