"""A configuration as people and later runs read it: YAML that loads again, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from simpo_megatron.config.sections import Config


def to_yaml(config: Config) -> str:
    """YAML of every option by section, from which the same configuration loads again."""
    blocks = [
        f"# {section}\n" + yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        for section, options in _sections_in_force(config).items()
    ]
    return "\n".join(blocks)


def options_in_force(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `config_from` makes the configuration of every option's value from, also when JSON made lists of tuples.

    Those options are left out that an alternative took the place of.
    """
    replaced = {
        "epochs" if options["train_iters"] else "train_iters",
        "valid_fraction" if options["valid_data"] else "valid_data",
    }
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if name not in replaced
    }


def to_table(config: Config) -> Table:
    """A rich table of the options that have a value, bold where not the default, gamma beside its ratio."""
    table = Table(
        title="configuration", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    table.add_column(style="dim")
    table.add_column()
    table.add_column(overflow="fold")
    for section, values in _sections_in_force(config).items():
        heading = section
        for name, value in values.items():
            if value in (None, [], ""):
                continue
            shown = " ".join(value) if isinstance(value, list) else _readable(value)
            own = getattr(config, section)
            is_default = getattr(own, name) == getattr(type(own), name)
            # Text, not markup: a file name may hold square brackets.
            table.add_row(heading, name, Text(shown), style=None if is_default else "bold")
            heading = ""
            if name == "gamma_beta_ratio":
                table.add_row("", "gamma", f"{config.objective.gamma:g} (beta x gamma_beta_ratio)")
    return table


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sections_in_force(config: Config) -> dict[str, dict[str, Any]]:
    """{section: {option: value}}, lists for tuples, without options that an alternative took the place of."""
    kept = options_in_force(config.flat())
    return {
        section: {
            name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if name in kept
        }
        for section, options in asdict(config).items()
    }
