"""A run as a NeMo-Run recipe, for any of its executors: local, Slurm, Kubernetes, clouds."""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from simpo_megatron.config import config_from
from simpo_megatron.errors import ConfigError
from simpo_megatron.training.run import train

if TYPE_CHECKING:
    import nemo_run


def simpo_recipe(**options: Any) -> nemo_run.Partial:
    """`train` on a configuration that can still be changed: `recipe.config.optimizer.lr = 1e-6`.

    `options` are those of the command line by name, such as `preset="llama3-instruct", model=DIR, tp=8`. An executor
    must start as many ranks as the layout needs, with torchrun.

    Raises: ConfigError: a mistake in the options, or nemo-run cannot be imported.
    """
    run = _nemo_run()
    return run.Partial(train, config=_changeable(config_from(**options), run))


def _changeable(section: Any, run: ModuleType) -> Any:
    """A section, and the sections in it, as NeMo-Run's Config of its class."""
    if not is_dataclass(section):
        return section
    values = {entry.name: getattr(section, entry.name) for entry in fields(section) if entry.init}
    return run.Config(type(section), **{name: _changeable(value, run) for name, value in values.items()})


def _nemo_run() -> ModuleType:
    try:
        return importlib.import_module("nemo_run")
    except ImportError as error:
        raise ConfigError(
            f"nemo_run: found {error}, expected nemo-run for a recipe; pip install 'simpo-megatron[nemo-run]'"
        ) from None
