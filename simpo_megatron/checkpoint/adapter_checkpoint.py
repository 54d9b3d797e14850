"""The adapters in a checkpoint of a run that trained nothing else, by the names that PEFT has for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.torch_dist import CheckpointReader
from simpo_megatron.config.lora_section import LoRAConfig
from simpo_megatron.convert.adapter import adapter_rules, adapter_tensors
from simpo_megatron.convert.adapter_folder import AdapterTensors, PeftFolder
from simpo_megatron.convert.mapping import pieces_by_rule
from simpo_megatron.convert.peft_files import is_peft_folder
from simpo_megatron.convert.weight_layouts import ALONE
from simpo_megatron.convert.weight_rules import Rule
from simpo_megatron.errors import CheckpointError, ConfigError
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.meta_model import StoredPart


def open_adapter(folder: Path, description: ModelDescription) -> AdapterTensors:
    """The adapters in `folder`, a PEFT folder or a committed checkpoint of adapters, for a model of `description`.

    Raises:
        CheckpointError: they are damaged, or those of another model.
        ConfigError: they are of a kind that is not computed here.
    """
    return PeftFolder(folder, description) if is_peft_folder(folder) else AdapterCheckpoint(folder, description)


class AdapterCheckpoint:
    """A committed checkpoint of adapters; whoever opens it has verified its files, or does."""

    def __init__(self, folder: Path, description: ModelDescription) -> None:
        """Raises: CheckpointError, when the checkpoint does not hold adapters of such a model."""
        self.folder = folder
        self.settings = _settings(manifest.read(folder).facts["model"], folder)
        self._reader = CheckpointReader(folder, lambda file: None)
        self._description = description
        self.names: Collection[str] = adapter_tensors(description, self.settings)
        self._places: dict[str, tuple[Rule, int]] = {}
        for rule, layer in adapter_rules(description, self.settings):
            for name in rule.hf_names:
                self._places[name.format(layer)] = rule, layer
        first = next(iter(self._places.values()))
        self.base_dtype: torch.dtype | None = self._reader.tensor(self._part(*first)).properties.dtype

    def read(self, name: str) -> Tensor:
        rule, layer = self._places[name]
        part = self._part(rule, layer)
        self._reader.fill(part)
        found = pieces_by_rule(part.values.view(rule.shape), rule, layer, self._description, ALONE)
        views = [piece.view.reshape(piece.hf_shape) for piece in found if piece.hf_name == name]
        # One A is the same for all parts of a layer, one tensor B of a fused layer is made of those of its parts.
        return views[0] if name.endswith(".lora_A.weight") else torch.cat(views)

    def _part(self, rule: Rule, layer: int) -> StoredPart:
        """The place of a parameter, empty: layers of one kind are stacked in one tensor, others are stored singly."""
        num_layers = self._description.transformer["num_layers"]
        key, singly = f"decoder.layers.{rule.parameter}", f"decoder.layers.{layer}.{rule.parameter}"
        if singly in self._reader.tensors:
            shape, offset = rule.shape, (0,) * len(rule.shape)
            return StoredPart(singly, shape, offset, torch.empty(shape, dtype=self._dtype(singly)), None)
        shape, offset = (num_layers, *rule.shape), (layer, *(0 for _ in rule.shape))
        return StoredPart(key, shape, offset, torch.empty((1, *rule.shape), dtype=self._dtype(key)), None)

    def _dtype(self, key: str) -> torch.dtype:
        stored = self._reader.tensors.get(key)
        return torch.float32 if stored is None else stored.properties.dtype


def _settings(facts: Mapping[str, Any], folder: Path) -> LoRAConfig:
    try:
        return LoRAConfig(
            lora_rank=facts["lora_rank"],
            lora_alpha=facts.get("lora_alpha"),
            use_rslora=bool(facts.get("use_rslora")),
            lora_targets=tuple(facts["lora_targets"]),
        )
    except (ConfigError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{folder}: found adapters that cannot be read ({error}), expected a run's own") from None
