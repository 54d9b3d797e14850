"""A configuration written out: as YAML that loads again, and as lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml
from rich.text import Text

from simpo_megatron.config.lint import idle_options
from simpo_megatron.config.sections import Config
from simpo_megatron.errors import visible
from simpo_megatron.loss import SimPOObjective


def to_yaml(config: Config) -> str:
    """YAML of every option by section, from which the same configuration loads again."""
    blocks = [
        f"# {section}\n" + yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        for section, options in _sections_in_force(config).items()
    ]
    return "\n".join(blocks)


def options_in_force(options: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option as `config_from` takes it, also when JSON made lists of tuples.

    Options that an alternative replaces are left out.
    """
    replaced = {
        *(name for name in ("epochs", "train_iters") if options.get(name) is None),
        "lr_warmup_iters" if options.get("lr_warmup_iters") is None else "lr_warmup_fraction",
        "eval_interval" if options.get("eval_epochs") else "eval_epochs",
        "valid_fraction" if options.get("valid_data") else "valid_data",
    }
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if name not in replaced
    }


def changed_options(config: Config) -> str:
    """Returns `preset NAME; option value, option value`: every option in use that differs from its default."""
    idle, flat, kept = idle_options(config), config.flat(), options_in_force(config.flat())
    defaults = Config(objective=type(config.objective)()).flat()
    changed = [
        f"{name} {_readable(flat[name])}"
        for name in kept
        if name not in idle and name != "preset" and flat[name] != defaults[name]
    ]
    parts = [f"preset {config.run.preset}"] if config.run.preset else []
    return "; ".join([*parts, ", ".join(changed) or "all at their defaults"])


def to_text(config: Config) -> Text:
    """A line for each option that has a value and a use, in bold and with its default where it has another value."""
    idle, kept = idle_options(config), _sections_in_force(config)
    shown = {
        section: [name for name, value in values.items() if value not in (None, [], "") and name not in idle]
        for section, values in kept.items()
    }
    width = max(len(name) for names in shown.values() for name in names)
    # Text, not markup: a file name may hold square brackets.
    text = Text("configuration")
    for section, names in shown.items():
        for name in names:
            heading = section if name == names[0] else ""
            text.append(f"\n{heading:10} ").append(f"{name:{width}}  ", style="dim")
            text.append(*_value_and_style(config, section, name))
            if name == "gamma_beta_ratio" and isinstance(config.objective, SimPOObjective):
                text.append(f"\n{'':10} {'gamma':{width}}  {config.objective.gamma:g} (beta x gamma_beta_ratio)")
    return text


def _value_and_style(config: Config, section: str, name: str) -> tuple[str, str]:
    own = getattr(config, section)
    value, default = getattr(own, name), getattr(type(own), name)
    if value == default:
        return _readable(value), ""
    return _readable(value) + (f"  (default {_readable(default)})" if default not in (None, (), "") else ""), "bold"


def _readable(value: Any) -> str:
    if isinstance(value, tuple):
        return visible(" ".join(map(str, value)))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else visible(value)


def _sections_in_force(config: Config) -> dict[str, dict[str, Any]]:
    """{section: {option: value}}, lists for tuples, without options that an alternative replaces."""
    kept = options_in_force(config.flat())
    return {
        section: {
            name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if name in kept
        }
        for section, options in asdict(config).items()
    }
