"""Foreign pickles read as data only: each call that a pickle asks for becomes a record of it, and nothing is called.

The unpickler is Python's own in Python, whose memo a large number in the file cannot blow up. Names that a format uses
become inert records of their arguments; every other name is refused. This module returns plain values.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch

_MAX_DEPTH = 32
_MAX_STACK = 100_000  # a writer puts a thousand items on it, and then into their list
_MAX_VALUES = 2_000_000
_MAX_BITS = 256  # numpy's generators have states of 128
# Sets and byte arrays, which no checkpoint has; one of these allocates as many bytes as the file asks for.
_REFUSED = (
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EMPTY_SET,
    pickle.FROZENSET,
    pickle.ADDITEMS,
)


class Inert:
    """An object of the pickle: the name of its class or function, its arguments and its state."""

    name = ""

    def __new__(cls, *arguments: Any) -> Inert:
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    arguments: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Table(Inert):
    """Stands for collections.OrderedDict; an instance is a dict, to which the pickle adds its items one by one."""

    def __new__(cls, *arguments: Any) -> Any:
        if arguments:
            raise pickle.UnpicklingError("it makes a table of other values")
        return {}


def _refuse(unpickler: Any) -> None:
    raise pickle.UnpicklingError("it has an operation that no checkpoint needs")


def _with_checked_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """Returns `load` behind a check of the keys on the stack: the hash of nested tuples takes 2**depth steps."""

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            if type(key) not in (str, int) and not isinstance(key, Inert):
                raise pickle.UnpicklingError(f"it has {shown(key)} for a key")
        load(unpickler)

    return checked


def _on_a_small_stack(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns `load` behind a check of the stack's size: each byte of a file may be a list, which takes 64."""

    def checked(unpickler: Any) -> None:
        if max(len(unpickler.stack), len(unpickler.metastack)) > _MAX_STACK:
            raise pickle.UnpicklingError(f"it has more than {_MAX_STACK} values that are in nothing")
        load(unpickler)

    return checked


_PYTHONS: Any = pickle._Unpickler
_OPERATIONS = {
    **_PYTHONS.dispatch,
    **dict.fromkeys((operation[0] for operation in _REFUSED), _refuse),
    pickle.MARK[0]: _on_a_small_stack(_PYTHONS.load_mark),
    pickle.EMPTY_LIST[0]: _on_a_small_stack(_PYTHONS.load_empty_list),
    pickle.EMPTY_DICT[0]: _on_a_small_stack(_PYTHONS.load_empty_dictionary),
    pickle.SETITEM[0]: _with_checked_keys(_PYTHONS.load_setitem, slice(-2, -1)),
    pickle.SETITEMS[0]: _with_checked_keys(_PYTHONS.load_setitems, slice(None, None, 2)),
    pickle.DICT[0]: _with_checked_keys(_PYTHONS.load_dict, slice(None, None, 2)),
}


class InertUnpickler(pickle._Unpickler):
    """Makes an `Inert` of each (module, name) for which `knows` is true, and refuses all others by name."""

    dispatch = _OPERATIONS

    def __init__(self, file: Any, knows: Callable[[str, str], bool]) -> None:
        super().__init__(file)
        self._knows = knows
        self._kinds: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return _Table
        if not self._knows(module, name):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self._kinds.setdefault(name, type(name, (Inert,), {"name": name, "__slots__": ("arguments", "state")}))

    def persistent_load(self, pid: Any) -> Any:
        return Persistent(pid)


class Persistent:
    """A persistent id: a reference of the pickle to data outside it."""

    __slots__ = ("pid",)

    def __init__(self, pid: Any) -> None:
        self.pid = pid


class PlainValues:
    """Copies a pickle's values into numbers, texts, lists and dicts; at most as many as a checkpoint can have."""

    def __init__(self, make: Callable[[Inert], Any] | None = None) -> None:
        """`make` gives the value of an inert record, or raises."""
        self._make = make
        self._left = _MAX_VALUES

    def of(self, value: Any, depth: int = _MAX_DEPTH) -> Any:
        """`value`, copied.

        Raises:
            pickle.UnpicklingError: it holds something else, or is too deep or too large.
        """
        self._left -= 1
        if not depth or not self._left:
            raise pickle.UnpicklingError("it is nested too deep, or too large")
        if type(value) is int and value.bit_length() > _MAX_BITS:
            raise pickle.UnpicklingError(f"it has a number of {value.bit_length()} bits")
        if value is None or type(value) in (bool, int, float, str, torch.dtype):
            return value
        if type(value) in (list, tuple):
            return type(value)(self.of(item, depth - 1) for item in value)
        if type(value) is dict:
            return {_key(key): self.of(item, depth - 1) for key, item in value.items()}
        if isinstance(value, Inert) and self._make is not None:
            return self._make(value)
        raise pickle.UnpicklingError(f"it has {shown(value)} for a plain value")


def _key(key: Any) -> int | str:
    if type(key) not in (int, str):
        raise pickle.UnpicklingError(f"it has {shown(key)} for a key")
    return key


def size_of(value: Any) -> torch.Size:
    """The shape in `value`, an inert record or a list of numbers.

    Raises:
        pickle.UnpicklingError: it is none.
    """
    if isinstance(value, Inert) and value.name == "Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, (tuple, list)) or len(value) > 64:
        raise pickle.UnpicklingError(f"it has {shown(value)} for a shape")
    return torch.Size([number(extent) for extent in value])


def number(value: Any) -> int:
    """`value`, which must be a non-negative whole number.

    Raises:
        pickle.UnpicklingError: it is none, or larger than any count.
    """
    if type(value) is not int or not 0 <= value < 2**62:
        raise pickle.UnpicklingError(f"it has {shown(value)} for a number")
    return value


def shown(value: Any) -> str:
    """`value` as text for a message."""
    return f"a {value.name or 'record'}" if isinstance(value, Inert) else f"a {type(value).__name__}"
