"""The numbers of ranks that share each kind of work; plain numbers, which a configuration holds."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """Numbers of ranks that share each kind of work."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1

    @property
    def model(self) -> int:
        """Ranks that together hold one replica of the model, without experts, and one microbatch."""
        return self.tensor * self.pipeline * self.context

    @property
    def min_world_size(self) -> int:
        """The smallest world that these sizes divide; experts are spread over whatever ranks a stage has."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert)
