"""Refusals of our own checks, answered in the spelling of the NeMo file whose settings they refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from simpo_megatron.config.options import Option, option_table
from simpo_megatron.config.reading import Layer
from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.translation_report import TranslationReport

HOW_TO_GO_ON = "to go on, add these behind the file's name:"
_REFUSED = re.compile(r"(?:^|: )([a-z_0-9]+): found ")


def line(key: str, option: Option) -> str:
    """`key=` and a value of `option`, or the form of one."""
    kinds = {bool: "true", int: "N", float: "X", str: "TEXT"}
    return f"{key}={option.choices[0] if option.choices else option.metavar or kinds[option.kind]}"


@dataclass(frozen=True)
class Spelling:
    """The keys by which a NeMo file sets our options."""

    simpo: str
    """Beginning of the keys of our own names."""
    same: Mapping[str, str]
    """Keys of the file whose values are those of our options, by option."""
    settings: Layer
    flags: frozenset[str]
    """Options that a flag has set, above any key."""

    @classmethod
    def of(cls, report: TranslationReport, layer: Layer, flags: Layer, simpo: str) -> Spelling:
        """The spelling of a file whose keys became `layer` as the report says."""
        same = {setting.partition("=")[0]: key for key, setting in report.taken.items()}
        return cls(simpo, same, layer, frozenset(flags))

    def remedy(self, error: ConfigError) -> str | None:
        """A line key=value for the option that `error` refuses; None where it names none, or a flag has set it."""
        named = _REFUSED.search(str(error))
        name = named[1] if named else ""
        if name not in option_table() or name in self.flags:
            return None
        option, setting = option_table()[name], self.settings.get(name)
        if setting is not None and option.is_optional and option.choices:
            return f"{setting.where.rpartition(': ')[2]}=null"
        key = self.same.get(name, self.simpo + name)
        return f"{key}=false" if setting is not None and setting.value is True else line(key, option)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Adds the lines that change what is refused to a ConfigError of the context."""
        try:
            yield
        except ConfigError as error:
            remedies = dict.fromkeys(filter(None, map(self.remedy, error.parts or (error,))))
            if remedies:
                error.details += (HOW_TO_GO_ON, *(f"  {remedy}" for remedy in remedies))
            raise
