"""The table of options, read from the sections: names, types, help, and how a written value is parsed."""

from __future__ import annotations

import difflib
import glob
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cache

from simpo_megatron.config.sections import OBJECTIVES, Config
from simpo_megatron.errors import ConfigError

# Short or Megatron-style names beside the fields' own.
ALIASES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "fp8": "fp8_recipe",
    "recompute": "recompute_granularity",
}
# Options that set the same thing: one file or command may name only one of a group.
EXCLUSIVE = (
    ("gamma_beta_ratio", "gamma"),
    ("bf16", "fp32"),
    ("lr_warmup_fraction", "lr_warmup_iters"),
    ("valid_data", "valid_fraction"),
    ("eval_interval", "eval_epochs"),
    ("chat_template_args", "chat_template_kwargs"),
)
ALTERNATIVES = (*EXCLUSIVE, ("epochs", "train_iters"))
"""Groups of which an option in a higher layer removes the others from a lower one; one layer may have both limits."""

# The name in Hugging Face's trainers.
_ELSEWHERE = {
    "adam_epsilon": "adam_eps",
    "dataset": "data",
    "eval_steps": "eval_interval",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_checkpointing": "recompute",
    "learning_rate": "lr",
    "logging_steps": "log_interval",
    "lr_scheduler_type": "lr_decay_style",
    "max_grad_norm": "clip_grad",
    "max_steps": "train_iters",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "output_dir": "save",
    "per_device_train_batch_size": "global_batch_size",
    "resume_from_checkpoint": "resume",
    "save_steps": "save_interval",
    "save_total_limit": "keep_checkpoints",
    "warmup_ratio": "lr_warmup_fraction",
}
_WHY_NOT_GAMMA_TWICE = "gamma is the margin itself, gamma_beta_ratio is gamma / beta (the authors' unit)"
_PATHS = ("DIR", "FILE")
_NUMBER = re.compile(r"[+-]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option: a field of a section, or a second way (`gamma`, `fp32`) to set one."""

    name: str
    section: str
    kind: type
    help: str
    default: object = None
    choices: tuple[str, ...] = ()
    is_list: bool = False
    is_optional: bool = False
    note: str = ""
    everyday: bool = False
    """True when `--help` shows it, and not only `--help-all`."""
    metavar: str = ""

    @property
    def expected(self) -> str:
        """The form of a value of this option, in words."""
        if self.choices:
            one = " | ".join(self.choices)
        else:
            one = {
                bool: "true or false",
                int: "a whole number",
                float: "a number such as 5e-7",
                str: "text",
            }[self.kind]
        return f"{one}, or several" if self.is_list else one + self.note

    def parse(self, text: str, where: str, *, quoted: bool = False) -> typing.Any:
        """One value from its text.

        Raises: ConfigError when the text is not of this option's type; a quoted "2" is text, not a number.
        """
        if self.is_optional and not quoted and text in ("null", "~", ""):
            return None
        if self.choices and text in self.choices:
            return text
        if self.kind is str and not self.choices and (text or self.default == ""):
            return as_path(text) if self.metavar in _PATHS else text
        if not quoted and self.kind is bool and text in ("true", "false"):
            return text == "true"
        if not quoted and self.kind is int and re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            return int(text)
        if not quoted and self.kind is float and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        shown = f'"{cut(text)}" in quotes' if quoted else repr(cut(text))
        raise ConfigError(f"{where}: {self.name}: found {shown}, expected {self.expected}")


_GAMMA_HELP = "Target margin itself, instead of gamma_beta_ratio. gamma is beta * gamma_beta_ratio."
_SECOND_NAMES = {
    "gamma_beta_ratio": Option(name="gamma", section="objective", kind=float, help=_GAMMA_HELP, everyday=True),
    "bf16": Option(name="fp32", section="precision", kind=bool, help="Train in fp32 instead of bf16.", everyday=True),
    "chat_template_args": Option(
        name="chat_template_kwargs",
        section="pairs",
        kind=str,
        default=(),
        is_list=True,
        help="The same as chat_template_args, as servers and other trainers call it.",
        metavar="KEY=VALUE",
    ),
}
"""Options that set the field of another one in other words, by that field."""


def as_path(text: str) -> str:
    """`path` with `~` and `..` resolved; shells do that only for some arguments, and YAML never.

    The `NAME=` before a validation file is kept.
    """
    name, path = "", text
    if "{{" in text or "{%" in text:  # a template, and no path to one
        return text
    if named := re.match(r"([\w.-]+=)(?=~|\.\.)", text):
        name, path = named[1], text[named.end() :]
    path = os.path.expanduser(path)
    if ".." in path.split("/") and "://" not in path and not glob.has_magic(path):
        path = os.path.realpath(path)
    return name + path


def cut(text: str) -> str:
    """`text` short enough to quote in a one-line message."""
    return text if len(text) <= 60 else text[:60] + "..."


@cache
def option_table() -> dict[str, Option]:
    """Every option by its own name (aliases apart), in the order of the sections."""
    table: dict[str, Option] = {}
    section_types = typing.get_type_hints(Config)
    for section, section_type in section_types.items():
        found = _objective_options() if section == "objective" else _options(section, section_type)
        for option in found:
            if option.name in table:
                raise AssertionError(f"{option.name} stands in two sections")
            table[option.name] = option
            if option.name in _SECOND_NAMES:
                second = _SECOND_NAMES[option.name]
                table[second.name] = second
    return table


def _options(section: str, section_type: type) -> list[Option]:
    """An option for each field of a section that may be set."""
    annotations = typing.get_type_hints(section_type)
    return [
        Option(
            name=entry.name,
            section=section,
            default=entry.default,
            **_describe_type(annotations[entry.name]),
            **entry.metadata,
        )
        for entry in fields(section_type)
        if entry.init
    ]


def _objective_options() -> list[Option]:
    """The option `objective` and the options of all objectives; one that several share has a default for each."""
    first = next(iter(OBJECTIVES))
    which = Option(
        name="objective",
        section="objective",
        kind=str,
        choices=tuple(OBJECTIVES),
        metavar="NAME",
        default=first,
        help=f"Loss to train with: {', '.join(OBJECTIVES)}. Options that only another objective has are refused.",
        everyday=True,
        note=" (kto is not among them: it learns from single responses labelled good or bad, and these are pairs)",
    )
    merged = {option.name: option for option in _options("objective", OBJECTIVES[first])}
    other_defaults: dict[tuple[str, object], list[str]] = {}
    for name, objective in itertools.islice(OBJECTIVES.items(), 1, None):
        for option in _options("objective", objective):
            if option.name in merged:
                other_defaults.setdefault((option.name, option.default), []).append(name)
            else:
                merged[option.name] = replace(option, help=f"With {name}: {option.help}")
    for (key, default), names in other_defaults.items():
        text = f"{merged[key].help} With {' and '.join(names)} the default is {default}."
        merged[key] = replace(merged[key], help=text)
    return [which, *merged.values()]


def _describe_type(annotation: typing.Any) -> dict[str, typing.Any]:
    """`kind`, `choices`, `is_list` and `is_optional` of a field's type."""
    is_optional = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if is_optional:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is tuple:
        return {"kind": typing.get_args(annotation)[0], "is_list": True, "is_optional": is_optional}
    if typing.get_origin(annotation) is typing.Literal:
        return {"kind": str, "choices": typing.get_args(annotation), "is_optional": is_optional}
    return {"kind": annotation, "is_optional": is_optional}


def find_option(name: str, where: str) -> Option:
    """The option called `name`, by its own name or an alias.

    Raises: ConfigError for any other name, with the nearest valid one.
    """
    table = option_table()
    name_or_alias = ALIASES.get(name, name)
    if name_or_alias in table:
        return table[name_or_alias]
    raise ConfigError(
        f"{where}: found unknown key {cut(name)!r}, expected an option{nearest(name, [*table, *ALIASES])}"
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean ...?`, or a pointer to --help when nothing is near."""
    valid = list(valid)
    meant = _ELSEWHERE.get(_plain(name))
    close = [other for other in valid if _plain(other) == meant]
    close = close or difflib.get_close_matches(name[:60], valid, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists the valid ones"


def _plain(name: str) -> str:
    """The key of a flag."""
    return name.removeprefix("--").replace("-", "_")


def refuse_both(names: dict[str, str]) -> None:
    """Check one file or command, given as {option: where}, for two names of an exclusive group.

    Raises: ConfigError naming both and how they differ.
    """
    for group in EXCLUSIVE:
        given = [name for name in group if name in names]
        if len(given) > 1:
            why = _WHY_NOT_GAMMA_TWICE if "gamma" in given else "they set the same option; pass only one"
            raise ConfigError(f"{names[given[1]]}: found both {given[0]} and {given[1]}, expected one of them: {why}")
