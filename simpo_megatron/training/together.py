"""Work that ranks do apart and answer for together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from simpo_megatron.errors import CheckpointError, SimPOError

Result = TypeVar("Result")


def agreed(work: Callable[[], Result]) -> Result:
    """What `work` returned on this rank; what it raised on any rank is raised on all.

    Collectives: one object gather, world.
    """
    own: list[Result] = []
    gathered(lambda: own.append(work()))
    return own[0]


def gathered(work: Callable[[], Result]) -> list[Result]:
    """What `work` returned on each rank; what it raised on any rank is raised on all.

    Collectives: one object gather, world.
    """
    result, problem = None, None
    try:
        result = work()
    except SimPOError as error:
        problem = error
    except Exception as error:
        problem = CheckpointError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, problem))
    for _, heard in outcomes:
        if heard is not None:
            raise heard
    return [outcome for outcome, _ in outcomes]
