"""Tokenizers in a process that needs no torch, whose import takes longer than all else that loads one."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def leave_out_torch() -> bool:
    """Imports transformers as where torch is not installed, and returns True; False if either was imported before.

    transformers asks once whether torch is there, so its models cannot be made in this process afterwards.
    """
    if not {"torch", "transformers"}.isdisjoint(sys.modules):
        return False
    advice = os.environ.get(_NO_ADVICE)
    # None stands for a module that cannot be found (Python's documentation of sys.modules).
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None
    # It would advise to install torch.
    os.environ[_NO_ADVICE] = "1"
    try:
        importlib.import_module("transformers")
    finally:
        del modules["torch"]
        if advice is None:
            del os.environ[_NO_ADVICE]
        else:
            os.environ[_NO_ADVICE] = advice
    return True


@contextmanager
def torch_left_out() -> Iterator[None]:
    """While the context lasts, transformers does without torch; the next import of transformers is a new one."""
    is_apart = leave_out_torch()
    try:
        yield
    finally:
        if is_apart:
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
                del sys.modules[name]
