"""Checkpoints verified by all ranks together."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.manifest import Checkpoint
from simpo_megatron.errors import CheckpointError
from simpo_megatron.ranks import on_first_rank, raise_on_all_ranks


def read_verified(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, whose bytes are those that were committed; each rank hashes a share of its files.

    Rank 0 lists the folder; the others open only their share.

    Collectives: those of `on_first_rank` and `raise_on_all_ranks`, world.

    Raises:
        CheckpointError: on every rank alike, naming the file that is missing or damaged.
    """
    checkpoint = on_first_rank(lambda: manifest.read(folder), wrap=CheckpointError)
    share = sorted(checkpoint.files)[dist.get_rank() :: dist.get_world_size()]
    raise_on_all_ranks(lambda: manifest.check_hashes(checkpoint, share), wrap=CheckpointError)
    return checkpoint
