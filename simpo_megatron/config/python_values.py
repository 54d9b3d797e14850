"""Options given in python, checked against their types as text of a file or a command line is."""

from __future__ import annotations

import numbers
import os
from typing import Any

from simpo_megatron.config.options import Option, cut
from simpo_megatron.errors import ConfigError


def python_value(option: Option, value: object, where: str) -> Any:
    """`value` as the field of `option` holds it: a path becomes text, one value of a list option a tuple.

    Raises: ConfigError naming the option, when `value` is not of its type.
    """
    if not option.is_list or value is None:
        return _one(option, value, where)
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_one(option, item, where) for item in values)


def _one(option: Option, value: object, where: str) -> Any:
    if value is None and (option.is_optional or option.default is None):
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and option.kind is str:
        return option.parse(value, where, quoted=not option.choices)
    if option.kind is bool and isinstance(value, bool):
        return value
    if not isinstance(value, bool):
        if option.kind is int and isinstance(value, numbers.Integral):
            return int(value)
        if option.kind is float and isinstance(value, numbers.Real):
            return float(value)
    raise ConfigError(f"{where}: {option.name}: found {cut(repr(value))}, expected {option.expected}")
