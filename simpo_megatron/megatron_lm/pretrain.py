"""Megatron-LM's `pretrain()` with SimPO's hooks, for every supported version of its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.enums import ModelType

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import cpu_patches, device
from simpo_megatron.megatron_lm.arguments import add_simpo_args
from simpo_megatron.megatron_lm.datasets import train_valid_test_datasets_provider
from simpo_megatron.megatron_lm.hooks import forward_step, model_provider

_ARGS_DEFAULTS = {"tokenizer_type": "HuggingFaceTokenizer"}


def pretrain() -> None:
    """Run Megatron-LM's training on the command line, its own arguments and those of `add_simpo_args`.

    Raises:
        ConfigError: megatron-core comes without Megatron-LM's training, or there is no CUDA device.
    """
    try:
        from megatron.training import training
    except ImportError as error:
        raise ConfigError(
            f"megatron.training: found {error}, expected Megatron-LM's training; megatron-core has it from 0.17 on "
            "(Python 3.12), before that put a checkout of Megatron-LM on PYTHONPATH"
        ) from error
    if not device.has_cuda():
        raise ConfigError(
            "device: found no CUDA, expected a CUDA device for Megatron-LM; examples/pretrain_simpo.py needs none"
        )
    cpu_patches.keep_compiled_helpers()
    training.pretrain(**pretrain_arguments(training.pretrain))


def pretrain_arguments(pretrain_function: Callable) -> dict[str, Any]:
    """Arguments for Megatron-LM's `pretrain_function`.

    Up to 0.17 it parses the command line itself; since 0.18 it takes the parsed arguments. The order of its parameters
    changed with 0.19, their names did not.
    """
    hooks = {
        "train_valid_test_dataset_provider": train_valid_test_datasets_provider,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    if "cfg_container" not in inspect.signature(pretrain_function).parameters:
        return {**hooks, "extra_args_provider": add_simpo_args, "args_defaults": _ARGS_DEFAULTS}
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_simpo_args, args_defaults=_ARGS_DEFAULTS)
    return {**hooks, "cfg_container": pretrain_cfg_container_from_args(args)}
