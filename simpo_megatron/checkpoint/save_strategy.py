"""megatron-core's way to save, kept from save to save, so that ranks tell each other once who writes what."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed import ProcessGroup

from simpo_megatron.ranks import sync_status

_SAME, _NOT_PLANNED_TWICE, _CHANGED = 0, 1, 2


class SaveStrategy:
    """The strategy of all saves of a run.

    At the first save each rank gets what all ranks hold, and rank 0 gets their plans; at the second it gets the plans
    once more. Later saves use both again, as Megatron-LM's --ckpt-assume-constant-structure does. That looks at no
    rank's tensors; here a rank that holds others than before lets all ranks begin anew.

    Args:
        group: the ranks that hold replicas and divide their writing, dp and cp.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._held = ""
        self._begin_anew()

    def of_save(self, tensors: Sequence[ShardedTensor]) -> tuple[Any, bool]:
        """(the strategy of a save of this rank's `tensors`, True where megatron has to compare what all ranks write).

        Collectives: that of `sync_status`, world.
        """
        held = _places(tensors)
        own = _SAME if self._base.validated_cache_reuse else _NOT_PLANNED_TWICE
        worst = sync_status(None, own if held == self._held else _CHANGED)
        if worst == _CHANGED:
            self._begin_anew()
        elif worst == _NOT_PLANNED_TWICE:
            # On every rank, or some would wait for others. Planned anew, so that both plans are compared.
            self._base.validated_cache_reuse, self._base.cached_local_plan = False, None
        self._held = held
        return self._divided, worst == _CHANGED

    def _begin_anew(self) -> None:
        # megatron-core 0.16 has one default for the whole process.
        self._base = copy.copy(get_default_save_sharded_strategy())
        self._base.use_cached_ckpt_structure = True
        self._divided = self._base
        if self._group.size() > 1:
            self._divided = FullyParallelSaveStrategyWrapper(self._base, self._group, do_cache_distribution=True)


def _places(tensors: Sequence[ShardedTensor]) -> str:
    """A hash of the names, types and places in the whole of this rank's tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        place = (tensor.key, tensor.dtype, tensor.local_shape, tensor.global_shape, tensor.global_offset)
        digest.update(repr((*place, tensor.replica_id, tensor.axis_fragmentations)).encode())
    return digest.hexdigest()
