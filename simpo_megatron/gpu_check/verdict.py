"""A check of the GPU path and its verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Result = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True, kw_only=True)
class CheckSetting:
    """Device, size and folder of the checks."""

    folder: Path
    """Folder for the checks' files alone."""
    log: Path
    """File to which all is added that checks, and the runs that they start, print."""
    rehearse: bool = False
    """True for tiny sizes on a CPU, where no speed is judged."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    def size(self, full: int, tiny: int) -> int:
        """`full` on a GPU, `tiny` in a rehearsal."""
        return tiny if self.rehearse else full


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check."""

    result: Result
    value: str
    """The finding, in a few words."""
    budget: str = ""
    """The expectation, in a few words."""
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers by name, as JSON takes them."""

    @classmethod
    def of(cls, holds: bool, value: str, budget: str, **details: Any) -> Verdict:
        """PASS when `holds`, else FAIL."""
        return cls("PASS" if holds else "FAIL", value, budget, details)

    @classmethod
    def skip(cls, why: str) -> Verdict:
        """The verdict of a check that this machine cannot run."""
        return cls("SKIP", why)


@dataclass(frozen=True)
class Check:
    """One check by name."""

    name: str
    title: str
    seconds: int
    """Its time limit."""
    run: Callable[[CheckSetting], Verdict]
