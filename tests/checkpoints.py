"""The contents of a checkpoint, independent of the layout of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: weights, moments and the ranks' random states (`rng.`)."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def stored_values(checkpoint: Path) -> dict[str, str]:
    """A hash of each tensor of a checkpoint; equal ones are equal bit for bit.

    Files are no measure: from megatron-core 0.17 on two of the same values differ.
    """
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in whole_tensors(checkpoint).items()
    }
