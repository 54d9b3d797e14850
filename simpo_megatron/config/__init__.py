"""Options of a run: read from presets, YAML and the command line, checked, printed and saved."""

from simpo_megatron.config.lint import lint
from simpo_megatron.config.machine import Machine
from simpo_megatron.config.presets import PRESETS
from simpo_megatron.config.reading import config_from, load_config, read_yaml
from simpo_megatron.config.resolving import (
    Layout,
    check_layout,
    num_train_iters,
    resolve,
    schedule_steps,
    steps_between_evaluations,
)
from simpo_megatron.config.sections import DEMO, Config, PrecisionConfig
from simpo_megatron.config.writing import changed_options, options_in_force, to_text, to_yaml

__all__ = [
    "DEMO",
    "PRESETS",
    "Config",
    "Layout",
    "Machine",
    "PrecisionConfig",
    "changed_options",
    "check_layout",
    "config_from",
    "lint",
    "load_config",
    "num_train_iters",
    "options_in_force",
    "read_yaml",
    "resolve",
    "schedule_steps",
    "steps_between_evaluations",
    "to_text",
    "to_yaml",
]
