"""The facts of a machine that a configuration depends on."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The facts of a rank's machine."""

    has_cuda: bool = False
    has_transformer_engine: bool = False
    cuda: tuple[int, int] | None = None
    """The version of CUDA that torch was built with."""
    compute_capability: tuple[int, int] | None = None
