"""Writes a rank's share of a checkpoint: at once, or in a thread while training goes on.

A thread, not a fork: it copies no connections or locks, ends with the rank, and passes on its errors.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from simpo_megatron.checkpoint.manifest import Digest, digest_file
from simpo_megatron.checkpoint.save_strategy import SaveStrategy
from simpo_megatron.checkpoint.sharded_state import RunState, described, request_write
from simpo_megatron.errors import CheckpointError
from simpo_megatron.ranks import gather_on_first_rank, raise_on_all_ranks, sum_over_ranks


def begin_write(
    state: RunState, iteration: int, folder: Path, strategy: SaveStrategy, *, in_background: bool
) -> Writing:
    """Starts writing the run's present tensors into the empty `folder`, which all ranks see.

    In the background, the host's memory holds a copy of this rank's shards until they are written.

    Args:
        strategy: as `request_write` has it.

    Collectives: those of `request_write`, that of `raise_on_all_ranks` and one all-reduce of 8 bytes, world.

    Raises:
        CheckpointError: on every rank alike, memory did not suffice for the copies.
        FailedAloneError: on this rank.
    """
    request, live = request_write(state, iteration, folder, strategy)
    arguments: list[Any] = []

    def stage() -> int:
        arguments.extend(_staged(request, live if in_background else set()))
        return _num_bytes(arguments) if request.async_fn is not None else 0

    num_bytes = sum_over_ranks(raise_on_all_ranks(stage, wrap=CheckpointError))
    writing = Writing(request, arguments, folder, num_bytes)
    writing.start(in_background=in_background)
    return writing


class Writing:
    """The write of this rank's share of one checkpoint."""

    def __init__(self, request: AsyncRequest, arguments: list[Any], folder: Path, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        """Bytes of the tensors of all ranks."""
        self._request, self._arguments, self._folder = request, arguments, folder
        self._digests: dict[str, Digest] = {}
        self._problem: Exception | None = None
        # Not a daemon: if Python ended it inside torch's writer, the process would crash.
        self._thread = threading.Thread(target=self._write, name="checkpoint writer")

    def start(self, *, in_background: bool) -> None:
        """Start the write; in the background, return before it has finished."""
        if in_background:
            self._thread.start()
        else:
            self._write()

    def is_under_way(self) -> bool:
        """True while this rank writes."""
        return self._thread.is_alive()

    def finish(self) -> dict[str, Digest]:
        """Waits for this rank's write, writes the index, and returns, on rank 0, the digests of all ranks' shard files.

        Collectives: that of `gather_on_first_rank` and megatron's, world.

        Raises:
            CheckpointError: on every rank alike, a rank could not write its share.
            FailedAloneError: on rank 0, which could not write the index.
        """
        if self._thread.is_alive():
            self._thread.join()
        digests = gather_on_first_rank(self._result, wrap=CheckpointError)
        with described(self._folder):
            for finalize in self._request.finalize_fns:
                finalize()
        return {name: digest for part in digests for name, digest in part.items()}

    def _write(self) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*self._arguments, **self._request.async_fn_kwargs)
                # The names are known. Listings by every rank would cost the square of the number of ranks.
                shards = sorted(self._folder / name for _, name, _ in self._arguments[1])
                self._digests = {path.name: digest_file(path) for path in shards if path.is_file()}
        except Exception as error:
            self._problem = error
        self._arguments = []

    def _result(self) -> dict[str, Digest]:
        if self._problem is not None:
            raise self._problem
        return self._digests


def _staged(request: AsyncRequest, live: set[int]) -> list[Any]:
    """The writer's arguments, with tensors copied to the host's memory, so that they share nothing with `live`."""
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        # The second, as megatron's own callers put it.
        arguments[1] = [
            (file, name, (texts, [(item, _apart(tensor, live)) for item, tensor in tensors]))
            for file, name, (texts, tensors) in request.preload_fn()
        ]
    return arguments


def _num_bytes(arguments: list[Any]) -> int:
    return sum(tensor.nbytes for _, _, (_, tensors) in arguments[1] for _, tensor in tensors)


def _apart(tensor: torch.Tensor, live: set[int]) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor
