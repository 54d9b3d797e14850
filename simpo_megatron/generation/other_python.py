"""Another Python, whose environment holds packages that this one does not."""

from __future__ import annotations

import os
from pathlib import Path

from simpo_megatron.errors import ConfigError


def other_python(key: str, variable: str, default: Path, *, holds: str, remedy: str) -> Path:
    """The Python that the environment's `variable` names, or else `default`; an absolute path.

    Args:
        key: first word of the error.
        holds: what its environment has, and this one need not have.

    Raises: ConfigError where there is none.
    """
    python = Path(os.environ.get(variable) or default)
    if not python.is_file():
        raise ConfigError(
            f"{key}: found no {python}, expected the Python of an environment that has {holds}; {remedy}, or name one "
            f"by {variable}"
        )
    # Absolute, because children run elsewhere. Not resolved, or it would be the Python that made the environment.
    return python.absolute()
