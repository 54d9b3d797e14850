"""Checkpoints of Megatron-LM and Megatron-Bridge in the format torch_dist: their weights, under megatron-core's names.

Nothing but the index and the tensors is looked at, both without unpickling: arguments, random states, optimizer and
configuration beside them are not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values

from simpo_megatron.checkpoint.sharded_state import is_object, sharding_metadata
from simpo_megatron.checkpoint.tensor_index import refuse_other_names
from simpo_megatron.checkpoint.torch_dist import CheckpointReader
from simpo_megatron.mcore.fp8_weights import awaited_values
from simpo_megatron.mcore.layers import weights_of
from simpo_megatron.mcore.lora import ADAPTER_SUFFIX
from simpo_megatron.mcore.meta_model import StoredPart, stored_parts
from simpo_megatron.mcore.model import PreferenceGPTModel
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import names_of_all_ranks, raise_on_all_ranks

# How the names begin of the tensors that Megatron-LM and Megatron-Bridge store beside the weights.
_NO_WEIGHTS = ("optimizer.", "chained_", "rng", "rerun_state", "opt_param_scheduler")
_LAYER = re.compile(r"decoder\.layers\.[0-9]+\.")


def read_foreign_weights(
    model: list[PreferenceGPTModel], groups: ParallelGroups, folder: Path, *, vocab_size: int
) -> None:
    """Fill the weights of this rank's `model` from `folder`, each rank reading its shards; adapters stay as they are.

    Collectives: those of two `raise_on_all_ranks` and of `names_of_all_ranks`, world.

    Raises:
        CheckpointError: on every rank alike, a weight is missing or has another shape, or there are some that are not
            the model's.
    """
    reader = raise_on_all_ranks(lambda: CheckpointReader(folder, lambda file: None))
    metadata = {**sharding_metadata(groups), "non_homogeneous_layers": any(map(_LAYER.match, reader.tensors))}
    parts = [part for chunk in model for part in _parts(chunk, metadata, vocab_size)]
    stored = {name for name in reader.tensors if not name.startswith(_NO_WEIGHTS)}
    expected = names_of_all_ranks({part.key for part in parts}, stored)

    def read() -> None:
        refuse_other_names(stored, expected, folder)
        for part in parts:
            reader.fill(part)

    raise_on_all_ranks(read)


def _parts(chunk: PreferenceGPTModel, metadata: dict[str, Any], vocab_size: int) -> list[StoredPart]:
    """The places of this rank's shards; layers are stacked in one tensor or stored singly, as `metadata` has it."""
    state = extract_matching_values(chunk.sharded_state_dict(metadata=metadata), is_object)[1]
    awaited, found = awaited_values([chunk]), []
    for name, weight in weights_of(chunk):
        if ADAPTER_SUFFIX in name:
            continue
        values = awaited.get(weight, weight.detach())
        # Rows that pad the vocabulary are not stored for every number of ranks.
        values.zero_()
        found += stored_parts(state[name], values, vocab_size)
    return found
