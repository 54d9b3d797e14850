"""Agreement of ranks: an error on one rank is raised on all, so that no rank waits for a peer that has failed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
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

    Args:
        groups: the ranks that take part, those of the last group the slowest to change; the world when none is given.
        wrap: the class that wraps other errors, such as those of a disk.

    Collectives: one all-reduce of 8 bytes over each group, or world; when a rank has an error, one object gather.

    Raises:
        SimPOError: on every rank alike, that of the first rank that has one.
        Exception: an error of another class, on the rank where it happened, when `wrap` is not given.
        ParallelError: on the other ranks then; the process ends with the exit code of an unexpected error.
    """
    own: list[Result] = []
    told: SimPOError | None = None
    unexpected: Exception | None = None
    try:
        own.append(work())
    except SimPOError as error:
        told = error
    except Exception as error:
        text = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        if wrap is not None:
            told = wrap(text)
        else:
            unexpected, told = error, ParallelError(f"stopped because of {text}")
            told.exit_code = SimPOError.exit_code
    (any_failed,) = _reduced([told is not None], dist.ReduceOp.MAX, groups)
    if not any_failed:
        return own[0]
    heard = _gather(told, groups)
    raise unexpected or next(error for error in heard if error is not None)


def on_first_rank(work: Callable[[], Result], *, wrap: type[SimPOError] | None = None) -> Result:
    """The result of `work`, done on rank 0 alone, on every rank.

    Args:
        wrap: as `raise_on_all_ranks` has it.

    Collectives: that of `raise_on_all_ranks` and one object broadcast, world.

    Raises: as `raise_on_all_ranks`.
    """
    done = raise_on_all_ranks(lambda: [work()] if dist.get_rank() == 0 else [None], wrap=wrap)
    dist.broadcast_object_list(done, src=0)
    return cast(Result, done[0])


def gather_on_first_rank(work: Callable[[], Result], *, wrap: type[SimPOError] | None = None) -> list[Result]:
    """The results of `work` of all ranks on rank 0, in the order of ranks; an empty list on the others.

    Args:
        wrap: as `raise_on_all_ranks` has it.

    Collectives: that of `raise_on_all_ranks` and one object gather to rank 0, world.

    Raises: as `raise_on_all_ranks`.
    """
    own = raise_on_all_ranks(work, wrap=wrap)
    parts: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(own, parts or None, dst=0)
    return parts


def build_on_first_ranks(load: Callable[[bool], Result]) -> Result:
    """`load(True)`, which may build what it loads, on the first rank of each node, then `load(False)` on the others.

    Rank 0 goes before the first ranks of other nodes: one that sees what rank 0 built has nothing left to build.

    Collectives: those of three `raise_on_all_ranks`, world.

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

    Every rank gets the results of all: for groups, or where ranks differ and each is to say how.

    Args and Raises: as `raise_on_all_ranks`.

    Collectives: that of `raise_on_all_ranks`, and one object gather over each group, or world.
    """
    return _gather(raise_on_all_ranks(work, *groups, wrap=wrap), groups)


def sum_over_ranks(value: int) -> int:
    """The sum of `value` over all ranks. Collectives: one all-reduce of 8 bytes, world."""
    (total,) = _reduced([value], dist.ReduceOp.SUM)
    return total


def are_equal(text: str) -> bool:
    """True when `text` is the same on every rank, as far as 62 bits of its hash tell.

    Collectives: one all-reduce of 16 bytes, world.
    """
    own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
    highest, lowest = _reduced([own, -own], dist.ReduceOp.MAX)
    return highest == -lowest


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
    failed, largest, highest, lowest = _reduced([error is not None, value, checksum, -checksum], dist.ReduceOp.MAX)
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


def names_of_all_ranks(own: set[str], known: set[str]) -> set[str]:
    """The names that any rank has of its `own`.

    Args:
        known: names that most are among, the same on every rank.

    Collectives: three all-reduces, of 16 bytes, 16 bytes and 8 bytes a known name, world; where a rank has others, one
    object gather of these.
    """
    names, others = sorted(known), own - known
    common: set[str] = set()
    if are_equal("\n".join(names)):
        used = _reduced([name in own for name in names], dist.ReduceOp.MAX)
        common = {name for name, is_used in zip(names, used, strict=True) if is_used}
    else:
        others = own
    if _reduced([len(others)], dist.ReduceOp.MAX)[0]:
        return common.union(*_gather(others, ()))
    return common


def _reduced(
    values: Sequence[int], operation: dist.ReduceOp.RedOpType, groups: tuple[ProcessGroup, ...] = ()
) -> list[int]:
    """`values` reduced over `groups`, or the world."""
    # Integers: a MAX over floats may lose a NaN. NCCL reduces what is on a GPU alone.
    place = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    word = torch.tensor(values, dtype=torch.int64, device=place)
    for group in groups or (None,):
        dist.all_reduce(word, op=operation, group=group)
    return word.tolist()


def _gather(value: Any, groups: tuple[ProcessGroup, ...]) -> list[Any]:
    """`value` of each rank of `groups`, or of the world. Each rank holds as many copies of the largest as there are."""
    gathered = [value]
    for group in groups or (None,):
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, gathered, group=group)
        gathered = [item for part in parts for item in part]
    return gathered
