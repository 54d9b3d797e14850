"""The launcher of this process, as its environment tells it: none, one beside other ranks, or torchrun's agent."""

from __future__ import annotations

import os

from simpo_megatron.errors import ConfigError

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which ranks meet, as torchrun sets them."""

PARENT = os.getppid()
"""Whoever started this process; it may be gone before a run begins."""


def is_launched() -> bool:
    """True when a launcher started this process, perhaps beside others."""
    return any(name in os.environ for name in RENDEZVOUS)


def has_agent() -> bool:
    """True when the parent of this process is torchrun's agent, which also keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def check_environment() -> None:
    """Return if the environment variables of the rendezvous are set.

    Raises: ConfigError: some are not.
    """
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if missing:
        raise ConfigError(
            f"environment: found no {', '.join(missing)}, expected them of a launcher; start the ranks with torchrun"
        )
