"""run_config.yaml in a checkpoint, by which Megatron-Bridge builds the model and loads the weights.

Source: NVIDIA-NeMo/Megatron-Bridge 0.3.1 and 0.6.0, training/model_load_save.py `load_model_config` and
`load_tokenizer`, training/checkpointing.py `load_checkpoint`, models/gpt_provider.py `GPTModelProvider`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from simpo_megatron.checkpoint.model_facts import rope_facts
from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.parallel import ParallelSizes

RUN_CONFIG_FILE = "run_config.yaml"
_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_ONLY_ONE_RANK = ParallelSizes()


def write_run_config(
    folder: Path,
    description: ModelDescription,
    *,
    place: Path,
    dtype: torch.dtype,
    hub_id: str | None,
    sizes: ParallelSizes = _ONLY_ONE_RANK,
) -> None:
    """Write run_config.yaml into `folder`, where Megatron-Bridge's provider of GPT models is all that the model needs.

    Args:
        place: the folder's later name, under which the tokenizer is found.
        dtype: of the weights.
        hub_id: the model's name on the hub, if it has one.
        sizes: of the layout that wrote the checkpoint.
    """
    model = _provider(description, dtype, sizes)
    if model is None:
        return
    content = {
        "model": {**model, "hf_model_id": hub_id},
        # Optimizer and random states are stored under this package's names, which Bridge does not read.
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "fully_parallel_save": True,
            "save_optim": False,
            "save_rng": False,
        },
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(place.absolute()),
        },
    }
    (folder / RUN_CONFIG_FILE).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _provider(description: ModelDescription, dtype: torch.dtype, sizes: ParallelSizes) -> dict[str, Any] | None:
    """The arguments of Bridge's GPTModelProvider; None if the model needs something that it lacks."""
    rope = rope_facts(description.rope)
    transformer = _plain(description.transformer)
    if transformer is None or "rope_parameters" in rope:
        return None
    gpt = dict(description.gpt)
    return {
        "_target_": _PROVIDER,
        **transformer,
        **rope,
        "seq_length": gpt.pop("max_sequence_length"),
        **gpt,
        "vocab_size": description.vocab_size,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 128,
        "attention_softmax_in_fp32": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": _named(dtype),
        "pipeline_dtype": _named(dtype),
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual_pipeline,
        "context_parallel_size": sizes.context,
        "expert_model_parallel_size": sizes.expert,
    }


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of megatron's TransformerConfig as YAML values; None where some are of our own code."""
    if arguments.keys() & vars(ArchitectureConfig)["__annotations__"].keys():
        return None
    if any(callable(value) and value.__module__.startswith("simpo_megatron.") for value in arguments.values()):
        return None
    plain = {name: _named(value) if callable(value) else value for name, value in arguments.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _named(value: Any) -> dict[str, Any]:
    """A function or dtype in the form of Bridge's YAML: its name, not to be called."""
    name = str(value) if isinstance(value, torch.dtype) else f"{value.__module__}.{value.__qualname__}"
    return {"_target_": name, "_call_": False}
