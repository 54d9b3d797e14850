"""Loads the configuration of a run from a NeMo file in any of its dialects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo_megatron.config import Config
from simpo_megatron.config.reading import Layer, read_nemo_command_line
from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.applying import apply
from simpo_megatron.nemo.bridge import BRIDGE
from simpo_megatron.nemo.keys import place_of, read_flat
from simpo_megatron.nemo.nemo1 import NEMO_1
from simpo_megatron.nemo.nemo2 import NEMO_2
from simpo_megatron.nemo.nemo_rl import NEMO_RL
from simpo_megatron.nemo.rules import Dialect
from simpo_megatron.nemo.spelling import Spelling
from simpo_megatron.nemo.translation_report import TranslationReport

if TYPE_CHECKING:
    from omegaconf import DictConfig

# A NeMo 2 file bears the marks of NeMo 1 as well, so it is looked for first.
DIALECTS = (NEMO_RL, NEMO_2, BRIDGE, NEMO_1)
_FLAG = "--nemo-config"


def load_nemo_config(
    source: str | Path | DictConfig, overrides: Sequence[str] = ()
) -> tuple[Config, TranslationReport]:
    """The configuration in NeMo's `source`, and a report on each of its keys.

    `source` is a YAML file, or what hydra has composed of one. `overrides` are key=value in its own dialect, above it.
    Every option of ours can be given by name under the dialect's SimPO section (`model.simpo.beta=2.5` in NeMo 1,
    `simpo.beta=2.5` elsewhere), and then wins over the dialect's own keys. Nothing that the source names (`_target_`)
    is imported or called.

    Raises: ConfigError naming file and key: no known dialect, unknown keys, unsupported values, two keys that disagree
    on one option; or omegaconf is not installed.
    """
    config, report, _ = _load(source, overrides, {})
    return config, report


def _load(
    source: str | Path | DictConfig, overrides: Sequence[str], flags: Layer
) -> tuple[Config, TranslationReport, Spelling]:
    values, where = read_flat(source, overrides), place_of(source)
    return apply(_dialect(values, where), values, where, flags)


def names_nemo_config(argv: Sequence[str]) -> bool:
    """True if the settings of the command line `argv` are those of a NeMo file."""
    return any(argument.split("=")[0] == _FLAG for argument in argv)


@dataclass(frozen=True)
class NemoCommand:
    """A command line with a NeMo file, read."""

    config: Config
    lines: list[str]
    """The report on the file's keys, to be printed."""
    only_explains: bool
    """True when only the report is asked for (`--explain-config`)."""
    spelling: Spelling
    """The file's keys of our options, for what is refused later."""


def load_nemo_command(argv: Sequence[str]) -> NemoCommand:
    """The command line `--nemo-config FILE key=value ... --flag value ...`; flags, those of `simpo train`, win.

    Raises: ConfigError as `load_nemo_config` does, for a second file, and for flags that are wrong.
    """
    flags, file, overrides, only_explains = read_nemo_command_line(list(argv))
    config, report, spelling = _load(file, overrides, flags)
    return NemoCommand(config, report.lines(every_key=only_explains), only_explains, spelling)


def _dialect(values: Mapping[str, Any], where: str) -> Dialect:
    for dialect in DIALECTS:
        for group in dialect.marks:
            if all(any(key.startswith(mark) for key in values) for mark in group):
                return dialect
    marks = "; ".join(f"{' and '.join(dialect.marks[0])} ({dialect.name})" for dialect in DIALECTS)
    raise ConfigError(f"{where}: found no configuration of NeMo, expected keys that start with {marks}")
