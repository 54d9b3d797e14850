"""A dict of bounded size, for what is found once for all inputs of one form."""

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

MAX_KEPT = 4096
"""Forms that one dict holds: data sets have few, and one that makes a new form of each record fills no memory."""


class BoundedDict(dict[Key, Value]):
    """A dict that forgets all it holds before it would hold more than MAX_KEPT values."""

    def __setitem__(self, key: Key, value: Value) -> None:
        if len(self) >= MAX_KEPT:
            self.clear()
        super().__setitem__(key, value)
