"""The facts of a model that a checkpoint keeps, as JSON values: its family, shape and rotary embedding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpo_megatron.mcore.families import ModelDescription

_LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def model_facts(description: ModelDescription) -> dict[str, Any]:
    """Facts of a model that a checkpoint keeps, as JSON values."""
    shape = {**description.transformer, **description.gpt, **rope_facts(description.rope)}
    return as_json({"family": description.family, "vocab_size": description.vocab_size, **shape})


def rope_facts(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding in the keys that checkpoints of every version have, and in full if those are not enough."""
    kind, factor = rope["rope_type"], rope.get("factor")
    facts = {
        "rope_scaling": kind == "llama3",
        "rope_scaling_factor": factor if kind == "llama3" else 8.0,
        "seq_len_interpolation_factor": factor if kind == "linear" else None,
    }
    is_of_llama_3_1 = {**rope, **_LLAMA_3_1_ROPE} == rope
    return facts if kind in ("default", "linear") or is_of_llama_3_1 else {**facts, "rope_parameters": rope}


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts` as JSON keeps them."""
    # Functions, such as an activation, by their names.
    return json.loads(json.dumps(facts, default=lambda value: getattr(value, "__name__", str(value))))
