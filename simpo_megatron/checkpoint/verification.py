"""Checkpoints verified by all ranks together."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.manifest import Checkpoint
from simpo_megatron.errors import CheckpointError
from simpo_megatron.ranks import raise_on_all_ranks


def read_verified(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, whose bytes are those that were committed; each rank hashes a share of its files.

    Collectives: one object gather, world.

    Raises:
        CheckpointError: on every rank alike, naming the file that is missing or damaged.
    """

    def check() -> Checkpoint:
        checkpoint = manifest.read(folder)
        manifest.check_hashes(checkpoint, sorted(checkpoint.files)[dist.get_rank() :: dist.get_world_size()])
        return checkpoint

    return raise_on_all_ranks(check, wrap=CheckpointError)
