"""Agreement of ranks: an error on one rank is raised on all, so that no rank waits for a peer that has failed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from simpo_megatron.errors import ParallelError, SimPOError, listed

Result = TypeVar("Result")

_MAX_SHOWN = 8


def raise_on_all_ranks(
    work: Callable[[], Result], *groups: ProcessGroup, wrap: type[SimPOError] | None = None
) -> Result:
    """The result of `work` on this rank; an error of any rank is raised on all.

    Args and Collectives and Raises: as `gather_or_raise`.
    """
    own: list[Result] = []
    gather_or_raise(lambda: own.append(work()), *groups, wrap=wrap)
    return own[0]


def build_on_first_ranks(load: Callable[[bool], Result]) -> Result:
    """`load(True)`, which may build what it loads, on the first rank of each node, then `load(False)` on the others.

    Rank 0 goes before the first ranks of other nodes: one that sees what rank 0 built has nothing left to build.

    Collectives: three object gathers, world.

    Raises:
        SimPOError: on every rank alike, the error of the first rank that has one.
    """
    is_first = dist.get_rank() == 0
    built = raise_on_all_ranks(lambda: load(True) if is_first else None)
    builds = not is_first and os.environ.get("LOCAL_RANK", "0") == "0"
    built = raise_on_all_ranks(lambda: load(True) if builds else built)
    return raise_on_all_ranks(lambda: load(False) if built is None else built)


def gather_or_raise(
    work: Callable[[], Result], *groups: ProcessGroup, wrap: type[SimPOError] | None = None
) -> list[Result]:
    """The results of `work` on each rank, in the order of ranks; an error of any rank is raised on all.

    Args:
        groups: the ranks that take part, those of the last group the slowest to change; the world when none is given.
        wrap: the class that wraps other errors, such as those of a disk.

    Collectives: one object gather over each group, or world.

    Raises:
        SimPOError: on every rank alike, that of the first rank that has one.
        Exception: an error of another class, on the rank where it happened, when `wrap` is not given.
        ParallelError: on the other ranks then; the process ends with the exit code of an unexpected error.
    """
    result: Result | None = None
    told: SimPOError | None = None
    unexpected: Exception | None = None
    try:
        result = work()
    except SimPOError as error:
        told = error
    except Exception as error:
        text = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        if wrap is not None:
            told = wrap(text)
        else:
            unexpected, told = error, ParallelError(f"stopped because of {text}")
            told.exit_code = SimPOError.exit_code
    outcomes: list[tuple[Result | None, SimPOError | None]] = _gather((result, told), groups)
    if unexpected is not None:
        raise unexpected
    for _, heard in outcomes:
        if heard is not None:
            raise heard
    return [cast(Result, outcome) for outcome, _ in outcomes]


def sync_status(error: SimPOError | None, value: int = 0, *, checksum: int = 0) -> int:
    """The largest `value` of any rank, when no rank has an error.

    Cheap enough for every step. Every rank calls it after work that may fail on one rank, before a collective in which
    its peers would wait for that rank.

    Args:
        checksum: of what must be the same on every rank, at most 62 bits.

    Collectives: one all-reduce of 32 bytes, world; when a rank has an error, one object gather.

    Raises:
        SimPOError: on every rank alike, the error of the first rank that has one of its own, and which rank it is.
        ParallelError: on every rank alike, when `checksum` is not the same, with the ranks that differ from most.
    """
    # Integers: a MAX over floats may lose a NaN. NCCL reduces what is on a GPU alone.
    place = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    word = torch.tensor([error is not None, value, checksum, -checksum], dtype=torch.int64, device=place)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    failed, largest, highest, lowest = word.tolist()
    if not failed and highest == -lowest:
        return int(largest)
    if not failed:
        raise _disagreement(checksum)
    errors: list[SimPOError | None] = _gather(error, ())
    # A rank that learned of a failure from a peer of its group has no error of its own.
    told = sorted((isinstance(heard, ParallelError), rank) for rank, heard in enumerate(errors) if heard is not None)
    rank = told[0][1]
    first = errors[rank]
    assert first is not None
    raised = type(first)(f"{first} (rank {rank})")
    raised.exit_code = first.exit_code
    raise raised from error


def _disagreement(checksum: int) -> ParallelError:
    every: list[int] = _gather(checksum, ())
    ((most, _),) = Counter(every).most_common(1)
    others = [rank for rank, value in enumerate(every) if value != most]
    return ParallelError(
        f"ranks: found different plans for this step, the pairs or microbatches of {listed(others, _MAX_SHOWN)} are "
        f"not those of the other ranks (of {len(every)}); start again and report it"
    )


def _gather(value: Any, groups: tuple[ProcessGroup, ...]) -> list[Any]:
    """`value` of each rank of `groups`, or of the world; the only function that sends objects between ranks."""
    gathered = [value]
    for group in groups or (None,):
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, gathered, group=group)
        gathered = [item for part in parts for item in part]
    return gathered
