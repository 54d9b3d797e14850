"""Trained adapters as a folder that PEFT loads: adapter_config.json and adapter_model.safetensors.

Hugging Face has a layer of its own for query, key and value (gate and up) where megatron has one, linear_qkv
(linear_fc1), whose adapter has one A and a B with the rows of that layer's weight. Each Hugging Face layer gets a
copy of A and its own rows of B, found as those of the weight are: B A is then, row by row, what megatron adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.config.lora_section import LoRAConfig, adapted_layers
from simpo_megatron.convert.export import Files, export_tensors
from simpo_megatron.convert.files import TensorSpec, open_safetensors, write_safetensors
from simpo_megatron.convert.folder import mark, write_json
from simpo_megatron.convert.mapping import (
    Piece,
    hf_tensors,
    layers_of,
    pieces_by_rule,
    rules_of_layers,
    shapes_by_rule,
)
from simpo_megatron.convert.weight_layouts import COLUMNS, REPLICATED, TensorRank, WeightLayout
from simpo_megatron.convert.weight_rules import Rule
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.lora import ADAPTER_SUFFIX
from simpo_megatron.parallel import ParallelGroups

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(
    model_chunks: Sequence[torch.nn.Module],
    description: ModelDescription,
    settings: LoRAConfig,
    source_folder: str | Path,
    out_folder: str | Path,
    *,
    groups: ParallelGroups,
    dtype: torch.dtype = torch.bfloat16,
    origin: str | None = None,
) -> None:
    """Write the adapters in PEFT's form to `out_folder`, which appears only when it is whole.

    `source_folder` is what the adapters belong to; PEFT reads it as base_model_name_or_path.

    Collectives and Raises: as `export_hf`.
    """
    rules = {(rule.parameter, layer): rule for rule, layer in _adapter_rules(description, settings)}
    tp = TensorRank(groups.tp.rank(), groups.tp.size())
    owned: dict[str, list[Piece]] = {}
    for chunk in model_chunks:
        for piece in _pieces(chunk, rules, description, tp):
            owned.setdefault(piece.hf_name, []).append(piece)
    shapes = adapter_tensors(description, settings)
    specs = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}
    modules = sorted({name.split(".")[-3] for name in shapes})

    def complete(staging: Path, files: Files) -> None:
        _join(staging, files)
        write_json(staging / CONFIG_FILE, _peft_config(settings, modules, source_folder))
        mark(staging)

    export_tensors(owned, specs, description, out_folder, complete, groups=groups, origin=origin)


def adapter_tensors(description: ModelDescription, settings: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that PEFT has for these adapters, in the order of the forward."""
    return shapes_by_rule(_adapter_rules(description, settings), description)


def trained_share(description: ModelDescription, settings: LoRAConfig) -> str:
    """The number of parameters of the whole model that are trained, in words; an A that layers share counts once."""
    total = sum(map(math.prod, hf_tensors(description).values()))
    if settings.lora_rank is None:
        return f"all {total:,} parameters"
    trained = sum(math.prod(rule.shape) for rule, _ in _adapter_rules(description, settings))
    total += trained
    what = f"adapters of rank {settings.lora_rank} on {', '.join(settings.lora_targets)}"
    return f"{trained:,} of {total:,} parameters ({trained / total:.2%}): {what}"


def _adapter_rules(description: ModelDescription, settings: LoRAConfig) -> Iterator[tuple[Rule, int]]:
    """(rule, layer counted from zero) of A and B of each target, from the rule of its weight."""
    rank = settings.lora_rank
    assert rank is not None, "a run without adapters has no rules for them"
    for rule, layer in rules_of_layers(description):
        layer_name = rule.parameter.removesuffix(".weight")
        if layer_name.rpartition(".")[2] not in adapted_layers(settings.lora_targets):
            continue
        num_outputs, num_inputs = rule.shape
        modules = [f"base_model.model.{name.removesuffix('.weight')}" for name in rule.hf_names]
        # One A for each layer of Hugging Face, which may be one for all views of the weight.
        names_of_A = tuple(dict.fromkeys(f"{module}.lora_A.weight" for module in modules))
        is_cut = rule.layout is COLUMNS
        copies = WeightLayout(1 if is_cut else None, partial(_copies, len(names_of_A)))
        yield Rule(f"{layer_name}{ADAPTER_SUFFIX}.lora_A", names_of_A, copies, (rank, num_inputs)), layer
        names_of_B = tuple(f"{module}.lora_B.weight" for module in modules)
        rows = REPLICATED if is_cut else rule.layout
        yield Rule(f"{layer_name}{ADAPTER_SUFFIX}.lora_B", names_of_B, rows, (num_outputs, rank)), layer


def _copies(number: int, parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    return (parameter,) * number


def _pieces(
    chunk: torch.nn.Module, rules: Mapping[tuple[str, int], Rule], description: ModelDescription, tp: TensorRank
) -> Iterator[Piece]:
    for module in layers_of(chunk):
        layer = module.layer_number - 1
        for name, parameter in module.named_parameters():
            if (name, layer) in rules:
                yield from pieces_by_rule(parameter.detach(), rules[name, layer], layer, description, tp)


def _join(staging: Path, files: Files) -> None:
    """One file, the only form PEFT reads, of those that the pipeline stages wrote."""
    specs = {name: spec for part in files.values() for name, spec in part.items()}

    def tensors() -> Iterator[Tensor]:
        for file_name, part in files.items():
            with open_safetensors(staging / file_name) as file:
                for name in part:
                    yield file.get_tensor(name)

    write_safetensors(staging / WEIGHTS_FILE, specs, tensors())
    for file_name in files:
        (staging / file_name).unlink()


def _peft_config(settings: LoRAConfig, modules: Sequence[str], source_folder: str | Path) -> dict[str, Any]:
    """adapter_config.json: what PEFT needs to rebuild the adapters; all else has PEFT's defaults.

    Source: https://github.com/huggingface/peft, LoraConfig.
    """
    rank = settings.lora_rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source_folder),
        "r": rank,
        "lora_alpha": rank if settings.lora_alpha is None else settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(modules),
        "bias": "none",
        "inference_mode": True,
    }
