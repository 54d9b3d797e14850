"""Sends experts of expert-parallel ranks to the rank that writes their stage's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron.mcore import device
from simpo_megatron.ranks import gather_or_raise


@dataclass(frozen=True)
class ExpertExchange:
    """The owner of each expert's tensors in one expert-parallel group; the group's first rank receives them."""

    owners: Mapping[str, int]
    """Rank in the group by Hugging Face name."""
    group: ProcessGroup

    @classmethod
    def of(cls, own_names: Sequence[str], group: ProcessGroup) -> ExpertExchange:
        """The exchange over `group`, each rank naming the experts' tensors that it holds.

        Collectives: one exchange of names over the group.
        """
        names_of_ranks = gather_or_raise(lambda: list(own_names), group)
        return cls({name: rank for rank, names in enumerate(names_of_ranks) for name in names}, group)

    def proceeds(self, says: bool) -> bool:
        """True when the group's first rank continues the export.

        Collectives: those of `gather_or_raise` over the group.
        """
        return gather_or_raise(lambda: says, self.group)[0]

    def join(self, own: Tensor) -> Tensor | None:
        """The rows of a tensor that holds all experts on the group's first rank; None on the others.

        Args:
            own: this rank's, as many as each has.

        Collectives: one gather over the group.
        """
        is_first = self.group.rank() == 0
        parts = [torch.empty_like(own) for _ in range(self.group.size())] if is_first else None
        dist.gather(own, parts, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return None if parts is None else torch.cat(parts)

    def bring(self, name: str, own: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The tensor `name` on the group's first rank; None on the others.

        Args:
            own: the tensor itself, contiguous and in `dtype`, on its owner.

        Collectives: one send from the owner to the first rank, unless they are the same.
        """
        owner, first = self.owners[name], dist.get_global_rank(self.group, 0)
        if self.group.rank() == owner != 0:
            assert own is not None, f"the owner of {name} does not have it"
            dist.send(own, first, group=self.group)
        if self.group.rank() != 0:
            return None
        if owner == 0:
            return own
        received = torch.empty(shape, dtype=dtype, device=device.current_device())
        dist.recv(received, dist.get_global_rank(self.group, owner), group=self.group)
        return received
