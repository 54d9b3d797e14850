"""Command-line flags, one per option: the parser, and the two helps."""

from __future__ import annotations

import argparse
import textwrap
import typing
from collections.abc import Sequence

from simpo_megatron.config.options import ALIASES, Option, option_table
from simpo_megatron.config.presets import PRESETS
from simpo_megatron.config.sections import Config
from simpo_megatron.errors import ConfigError

_USAGE = """simpo train [--config FILE | --preset NAME] [--KEY VALUE ...]
       simpo train --nemo-config FILE [KEY=VALUE ...] [--explain-config] [--KEY VALUE ...]
       torchrun --nproc-per-node N examples/pretrain_simpo.py [the same]"""
_ABOUT = """SimPO on Megatron-Core. Each flag is also a key of the YAML file of --config (--lr is lr).
The command line wins over the file, the file over the preset."""
_NEMO_HELP = (
    "File of NeMo-RL or Megatron-Bridge, and changes to it as KEY=VALUE in its own spelling. Those of NeMo-Aligner "
    "with NeMo 1 and of NeMo 2, whose development has ended, are read too; their tables are frozen."
)
_OF_NO_OPTION = ("config", "nemo_config", "explain_config", "help", "help_all")
_SHOWN_OF_A_PRESET = ("lr", "beta", "gamma_beta_ratio", "global_batch_size", "max_length")
_WIDTH = 100
_FLAG_WIDTH = 28


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"command line: {message}")


def flag_of(name: str) -> str:
    """Returns the flag of an option or alias."""
    return "--" + name.replace("_", "-")


def make_parser() -> FlagParser:
    """Returns a parser with a flag per option; a flag that is not given leaves no trace in the namespace.

    `help` and `help_all` are true there when they are asked for.
    """
    parser = FlagParser(
        usage=_USAGE,
        description=_ABOUT,
        epilog=_preset_help(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=_WIDTH),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options.")
    parser.add_argument("--nemo-config", metavar=("FILE", "KEY=VALUE"), nargs="+", help=_NEMO_HELP)
    parser.add_argument(
        "--explain-config", action="store_true", help="Say what becomes of each key of the NeMo file, and exit."
    )
    parser.add_argument("-h", "--help", action="store_true", help="Show the everyday options and exit.")
    parser.add_argument("--help-all", action="store_true", help="Show this and exit.")
    groups: dict[str, argparse._ArgumentGroup] = {}
    section_types = typing.get_type_hints(Config)
    for option in option_table().values():
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(option.section, _summary(section_types[option.section]))
        groups[option.section].add_argument(*_flags(option), dest=option.name, **_argument(option))
    return parser


def short_help() -> str:
    """Returns the help of the everyday options, a line each, in one screen."""
    lines = [f"usage: {_USAGE}", "", _ABOUT, "", _line("--config FILE", "YAML file of options.")]
    everyday = [option for option in option_table().values() if option.everyday]
    # Shown beside --config, which it replaces.
    everyday.sort(key=lambda option: option.name != "preset")
    lines += map(_short_line, everyday)
    lines.append(_line("--help-all", f"Show all {len(option_table())} options, in full, and the presets' settings."))
    presets = textwrap.fill(f"presets: {', '.join(PRESETS)}", _WIDTH)
    return "\n".join([*lines, "", presets])


def _short_line(option: Option) -> str:
    flag = next((alias for alias, name in ALIASES.items() if name == option.name), option.name)
    value = "" if option.kind is bool else f" {option.metavar or _choices_or_kind(option)}"
    dots = " ..." if option.is_list else ""
    text = option.help.split(". ")[0].removesuffix(".") + "."
    return _line(flag_of(flag) + value + dots, text + _default(option))


def _line(flag: str, text: str) -> str:
    return f"  {flag:{_FLAG_WIDTH}} {text}"


def _summary(section_type: typing.Any) -> str:
    """Returns the first paragraph of a section's docstring; of several objectives, the first one's."""
    documented = next(iter(typing.get_args(section_type)), section_type)
    return textwrap.fill(" ".join(documented.__doc__.split("\n\n")[0].split()), _WIDTH - 5)


def _flags(option: Option) -> list[str]:
    return [*(flag_of(alias) for alias, name in ALIASES.items() if name == option.name), flag_of(option.name)]


def _argument(option: Option) -> dict[str, typing.Any]:
    """Returns argparse's arguments; values stay text, because they are parsed like those of YAML."""
    argument: dict[str, typing.Any] = {"help": (option.help + _default(option)).replace("%", "%%")}
    if option.name == "fp32":
        return argument | {"action": "store_true"}
    if option.kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction}
    argument["metavar"] = "|".join(option.choices) or option.metavar or _choices_or_kind(option)
    # A list given twice is joined; argparse's default would drop the first.
    return argument | {"nargs": "+", "action": "extend"} if option.is_list else argument


def _choices_or_kind(option: Option) -> str:
    return "|".join(option.choices) or {int: "N", float: "X", str: "TEXT"}[option.kind]


def _default(option: Option) -> str:
    default = option.default
    if default is None or default is False or default in ((), ""):
        return ""
    if isinstance(default, tuple):
        return f" (default {' '.join(map(str, default))})"
    if default is True:
        return f" (default on; {flag_of('no_' + option.name)})"
    return f" (default {f'{default:g}' if isinstance(default, float) else default})"


def _preset_help() -> str:
    lines = ["presets:"]
    for name, preset in PRESETS.items():
        lines.append(f"  {name:22} {preset.summary}")
        constants = [f"{key} {preset.options[key]:g}" for key in _SHOWN_OF_A_PRESET if key in preset.options]
        lines.append(f"  {'':22} {', '.join(constants)}")
    return "\n".join(lines)


def flag_names() -> Sequence[str]:
    """Returns every flag that the command line takes."""
    return [flag_of(name) for name in (*option_table(), *ALIASES, *_OF_NO_OPTION)]
