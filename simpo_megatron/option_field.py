"""A dataclass field that is an option of the command line: its default, its help and how prominent it is."""

from __future__ import annotations

from dataclasses import field
from typing import TypeVar, cast

T = TypeVar("T")


def option(default: T, text: str, *, everyday: bool = False, metavar: str = "") -> T:
    """Returns a dataclass field; typed as its value, as `dataclasses.field` is.

    Args:
        default: the option's default, immutable.
        text: the help; its first sentence alone must do for `--help`, where one line shows an option.
        everyday: show the option in `--help`, not only in `--help-all`.
        metavar: what stands for the value in the help, such as DIR; a word of the type when empty.
    """
    return cast(T, field(default=default, metadata={"help": text, "everyday": everyday, "metavar": metavar}))
