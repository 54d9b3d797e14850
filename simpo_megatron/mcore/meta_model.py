"""The whole model on one rank on torch's meta device: its parameters' names, shapes and places in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from simpo_megatron.config import config_from
from simpo_megatron.mcore.families import ModelDescription, padded_vocab_size
from simpo_megatron.mcore.layers import weights_of
from simpo_megatron.mcore.model import PreferenceGPTModel, transformer_config
from simpo_megatron.mcore.specs import block_spec
from simpo_megatron.parallel import ParallelGroups


@dataclass(frozen=True)
class StoredPart:
    """A part of a parameter and its place in one tensor of a distributed checkpoint, which stacks all layers."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor
    """A view of the parameter with as many dimensions as the stored tensor."""
    num_true_rows: int | None
    """Rows of a vocabulary, whose stored tensor may have more for padding; None for other parameters."""


class MetaModel:
    """Parameters by name on the meta device, and the places megatron-core stores them in.

    The vocabulary is padded for one tensor-parallel rank.
    """

    def __init__(self, description: ModelDescription, groups: ParallelGroups) -> None:
        config = transformer_config(description, config_from(model="unused", data=("unused",)))
        # Megatron names a CUDA device outright otherwise.
        config.use_cpu_initialization = True
        with torch.device("meta"):
            self.chunk = PreferenceGPTModel(
                config,
                block_spec(config, None, transformer_engine=False),
                padded_vocab_size(description.vocab_size, 1),
                true_vocab_size=description.vocab_size,
                **description.gpt,
            )
        self._vocab_size = description.vocab_size
        self.state: dict[str, Any] = self.chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        self.shapes = {name: tuple(parameter.shape) for name, parameter in weights_of(self.chunk)}
        self.state = {name: self.state[name] for name in self.shapes}

    def parts(self, name: str, values: Tensor) -> list[StoredPart]:
        """The places in which the `values` of the parameter `name` are stored."""
        return stored_parts(self.state[name], values, self._vocab_size)


def stored_parts(entry: ShardedTensor | ShardedTensorFactory, values: Tensor, vocab_size: int) -> list[StoredPart]:
    """The places of `values`, a rank's shard of a parameter whose `entry` megatron's sharded_state_dict gives."""
    if isinstance(entry, ShardedTensorFactory):
        found = nested_values(entry.build_fn(entry.key, values, entry.replica_id, entry.flattened_range))
    else:
        found = [replace(entry, data=values, dtype=values.dtype)]
    return [_stored_part(part, vocab_size) for part in found]


def _stored_part(part: ShardedTensor, vocab_size: int) -> StoredPart:
    stacked = part.data.view((1,) * part.prepend_axis_num + tuple(part.data.shape))
    return StoredPart(
        key=part.key,
        global_shape=tuple(part.global_shape),
        offset=tuple(part.global_offset),
        values=stacked,
        num_true_rows=vocab_size if part.allow_shape_mismatch else None,
    )
