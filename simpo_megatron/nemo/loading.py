"""The configuration of a run from a NeMo file, in whichever of NeMo's dialects it is written."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo_megatron.config import Config
from simpo_megatron.config.reading import config_of
from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.bridge import BRIDGE
from simpo_megatron.nemo.keys import place_of, read_flat
from simpo_megatron.nemo.nemo1 import NEMO_1
from simpo_megatron.nemo.nemo2 import NEMO_2
from simpo_megatron.nemo.nemo_rl import NEMO_RL
from simpo_megatron.nemo.rules import Dialect, TranslationReport, apply

if TYPE_CHECKING:
    from omegaconf import DictConfig

# A NeMo 2 file bears the marks of NeMo 1 as well, so it is looked for first.
DIALECTS = (NEMO_RL, NEMO_2, BRIDGE, NEMO_1)
_FLAG = "--nemo-config"


def load_nemo_config(
    source: str | Path | DictConfig, overrides: Sequence[str] = ()
) -> tuple[Config, TranslationReport]:
    """The configuration that NeMo's `source` asks for, and what became of each of its keys.

    `source` is a YAML file, or what hydra has composed of one. `overrides` are key=value in its own dialect, above it.
    Every option of ours can be given by name under the dialect's SimPO section (`model.simpo.beta=2.5` in NeMo 1,
    `simpo.beta=2.5` elsewhere), and then wins over the dialect's own keys. Nothing that the source names (`_target_`)
    is imported or called.

    Raises: ConfigError naming file and key: of no dialect, unknown keys, values that cannot be had here, two keys
    that differ on one option; and when omegaconf is not installed.
    """
    values, where = read_flat(source, overrides), place_of(source)
    layer, report = apply(_dialect(values, where), values, where)
    return config_of(layer), report


def names_nemo_config(argv: Sequence[str]) -> bool:
    """True if the settings of the command line `argv` are those of a NeMo file."""
    return any(argument.split("=")[0] == _FLAG for argument in argv)


def load_nemo_command(argv: Sequence[str]) -> tuple[Config, TranslationReport]:
    """`load_nemo_config` of the command line `--nemo-config FILE key=value ...`.

    Raises: ConfigError as it does, and for flags beside the file: settings are keys of the file's dialect.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(_FLAG, required=True)
    parser.add_argument("overrides", nargs="*")
    given, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise ConfigError(
            f"command line: found {unknown[0][:60]!r} beside {_FLAG}, expected key=value; every option of this program "
            "is a key under simpo (model.simpo in NeMo 1), such as simpo.lr=5e-7"
        )
    return load_nemo_config(given.nemo_config, given.overrides)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"command line: {message}")


def _dialect(values: Mapping[str, Any], where: str) -> Dialect:
    for dialect in DIALECTS:
        for group in dialect.marks:
            if all(any(key.startswith(mark) for key in values) for mark in group):
                return dialect
    marks = "; ".join(f"{' and '.join(dialect.marks[0])} ({dialect.name})" for dialect in DIALECTS)
    raise ConfigError(f"{where}: not a recognised NeMo configuration, expected keys that start with {marks}")
