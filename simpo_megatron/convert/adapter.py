"""Trained adapters as a folder that PEFT loads: adapter_config.json and adapter_model.safetensors.

Hugging Face has separate layers for query, key and value (gate and up), megatron one, linear_qkv (linear_fc1). Its
adapter has one A, and a B with the rows of that layer's weight. Each Hugging Face layer gets a copy of A and its rows
of B, found like those of the weight. So B A is, row by row, what megatron adds. If the parts are separate targets, each
has its own A in megatron too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.config.lora_section import LORA_PARTS, LoRAConfig
from simpo_megatron.convert.export import Files, export_tensors
from simpo_megatron.convert.files import TensorSpec, write_safetensors
from simpo_megatron.convert.folder import copy_tokenizer, mark, write_json
from simpo_megatron.convert.mapping import (
    Piece,
    hf_tensors,
    layers_of,
    pieces_by_rule,
    rules_of_layers,
    shapes_by_rule,
)
from simpo_megatron.convert.peft_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from simpo_megatron.convert.stored_tensors import open_safetensors
from simpo_megatron.convert.weight_layouts import COLUMNS, REPLICATED, TensorRank, WeightLayout
from simpo_megatron.convert.weight_rules import Rule, layer_rules
from simpo_megatron.errors import require
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.lora import ADAPTER_SUFFIX
from simpo_megatron.parallel import ParallelGroups


def export_adapter(
    model_chunks: Sequence[torch.nn.Module],
    description: ModelDescription,
    settings: LoRAConfig,
    base_model: str | Path,
    out_folder: str | Path,
    *,
    groups: ParallelGroups,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
    tokenizer_folder: Path | None = None,
    model_card: str | None = None,
    chat_template: str | None = None,
    origin: str | None = None,
) -> None:
    """Write the adapters in PEFT's form to `out_folder`, which appears only when it is whole.

    `base_model` is what the adapters belong to, a folder or, with its `revision`, the hub's name; PEFT reads it as
    base_model_name_or_path. The tokenizer comes from `tokenizer_folder`, where it is given; `chat_template` replaces
    its template, `model_card` becomes README.md.

    Collectives and Raises: as `export_hf`.
    """
    tp = TensorRank(groups.tp.rank(), groups.tp.size())
    owned: dict[str, list[Piece]] = {}
    for chunk in model_chunks:
        for piece in adapter_pieces(chunk, description, settings, tp):
            owned.setdefault(piece.hf_name, []).append(piece)
    shapes = adapter_tensors(description, settings)
    specs = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}
    modules = sorted({name.split(".")[-3] for name in shapes})

    def complete(staging: Path, files: Files) -> None:
        _join(staging, files)
        write_json(staging / CONFIG_FILE, _peft_config(settings, modules, base_model, revision))
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, staging, chat_template=chat_template)
        mark(staging, model_card)

    export_tensors(owned, specs, description, out_folder, complete, groups=groups, origin=origin)


def adapter_tensors(description: ModelDescription, settings: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that PEFT has for these adapters, in the order of the forward."""
    shapes = shapes_by_rule(adapter_rules(description, settings), description)
    # Of a part that gets none, megatron's B has rows too.
    return {name: shape for name, shape in shapes.items() if name.replace(".lora_B.", ".lora_A.") in shapes}


def adapter_pieces(
    chunk: torch.nn.Module, description: ModelDescription, settings: LoRAConfig, tp: TensorRank
) -> Iterator[Piece]:
    """The adapters of this rank's model `chunk`, as the parts of the tensors that PEFT has for them."""
    rules = {(rule.parameter, layer): rule for rule, layer in adapter_rules(description, settings)}
    names = adapter_tensors(description, settings)
    for module in layers_of(chunk):
        layer = module.layer_number - 1
        for name, parameter in module.named_parameters():
            if (name, layer) in rules:
                found = pieces_by_rule(parameter.detach(), rules[name, layer], layer, description, tp)
                yield from (piece for piece in found if piece.hf_name in names)


def require_targets(description: ModelDescription, settings: LoRAConfig) -> None:
    """Return if the model has the layers that `settings` adapt.

    Raises:
        ConfigError: they are parts of a layer that is one in Hugging Face's model too, or that it has not.
    """
    rules = {rule.parameter.removesuffix(".weight").rpartition(".")[2]: rule for rule in layer_rules(description, 0)}
    for target, parts in settings.own_parts.items():
        rule = rules.get(target)
        has_parts = rule is not None and len(set(rule.hf_names)) == len(LORA_PARTS.get(target, ()))
        found = [part for part in settings.lora_targets if part in LORA_PARTS.get(target, ())]
        whole = f"{target}, as {description.family} has no layers of their own for {', '.join(found)}"
        require(parts is None or has_parts, "lora_targets", " ".join(found), whole)


def trained_share(description: ModelDescription, settings: LoRAConfig) -> str:
    """A phrase with the number of trained parameters of the whole model; an A that layers share counts once."""
    total = sum(map(math.prod, hf_tensors(description).values()))
    if settings.lora_rank is None:
        return f"all {total:,} parameters"
    rules = adapter_rules(description, settings)
    trained = sum(math.prod(rule.shape) for rule, _ in rules if rule.parameter.endswith(".lora_A"))
    tensors = adapter_tensors(description, settings).items()
    trained += sum(math.prod(shape) for name, shape in tensors if name.endswith(".lora_B.weight"))
    total += trained
    what = f"adapters of rank {settings.lora_rank} on {', '.join(settings.lora_targets)}"
    return f"{trained:,} of {total:,} parameters ({trained / total:.2%}): {what}"


def adapter_rules(description: ModelDescription, settings: LoRAConfig) -> Iterator[tuple[Rule, int]]:
    """(rule, layer counted from zero) of A and B of each target, from the rule of its weight."""
    rank = settings.lora_rank
    assert rank is not None, "a run without adapters has no rules for them"
    for rule, layer in rules_of_layers(description):
        layer_name = rule.parameter.removesuffix(".weight")
        target = layer_name.rpartition(".")[2]
        if target not in settings.layers:
            continue
        num_outputs, num_inputs = rule.shape
        modules = [PREFIX + name.removesuffix(".weight") for name in rule.hf_names]
        is_cut, own_parts = rule.layout is COLUMNS, settings.layers[target]
        # One A for each layer of Hugging Face, which may be one for all views of the weight.
        with_A = dict.fromkeys(modules if own_parts is None else [modules[part] for part in own_parts])
        names_of_A = tuple(f"{module}.lora_A.weight" for module in with_A)
        num_own = 1 if own_parts is None else len(own_parts)
        divide = partial(_copies if own_parts is None else _one_below_the_other, len(names_of_A))
        layout = WeightLayout(1 if is_cut else None, divide)
        yield Rule(f"{layer_name}{ADAPTER_SUFFIX}.lora_A", names_of_A, layout, (num_own * rank, num_inputs)), layer
        names_of_B = tuple(f"{module}.lora_B.weight" for module in modules)
        rows = REPLICATED if is_cut else rule.layout
        yield Rule(f"{layer_name}{ADAPTER_SUFFIX}.lora_B", names_of_B, rows, (num_outputs, rank)), layer


def _copies(number: int, parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    return (parameter,) * number


def _one_below_the_other(number: int, parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    return parameter.chunk(number)


def _join(staging: Path, files: Files) -> None:
    """Joins the files of the pipeline stages into one, the only form that PEFT reads."""
    specs = {name: spec for part in files.values() for name, spec in part.items()}

    def tensors() -> Iterator[Tensor]:
        for file_name, part in files.items():
            with open_safetensors(staging / file_name) as file:
                for name in part:
                    yield file.get_tensor(name)

    write_safetensors(staging / WEIGHTS_FILE, specs, tensors())
    for file_name in files:
        (staging / file_name).unlink()


def _peft_config(
    settings: LoRAConfig, modules: Sequence[str], base_model: str | Path, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json with the keys that PEFT needs to rebuild the adapters; others have PEFT's defaults.

    Source: https://github.com/huggingface/peft, LoraConfig.
    """
    rank = settings.lora_rank
    assert rank is not None, "a run without adapters exports none"
    alpha = rank if settings.lora_alpha is None else settings.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "revision": revision,
        "r": rank,
        # Written as a whole number where it is one: PEFT's type for it is int.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": settings.use_rslora,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(modules),
        "bias": "none",
        "inference_mode": True,
    }
