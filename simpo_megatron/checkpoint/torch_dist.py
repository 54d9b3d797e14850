"""megatron-core's distributed checkpoints, written and read one parameter at a time.

megatron-core needs all tensors in memory. torch's checkpoint library beneath it asks for one tensor at a time, so this
module uses that library directly.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.tensor_index import read_index
from simpo_megatron.checkpoint.torch_files import read_torch_file
from simpo_megatron.convert.direct_io import DirectFile
from simpo_megatron.errors import CheckpointError, SimPOError, StoppedBySignal
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.mcore.meta_model import MetaModel, StoredPart

COMMON_FILE = "common.pt"
"""The name that megatron-core gives the file of all that is no tensor."""

_SHARD_BYTES = 512 << 20
"""Size at which a file ends, for whoever reads verifies one while it reads the one before."""


def write_parameters(
    model: MetaModel, dtypes: dict[str, torch.dtype], compute: Callable[[str], Tensor], folder: Path
) -> dict[str, manifest.Digest]:
    """Write a checkpoint of weights alone into the empty `folder`, holding one parameter at a time.

    Returns the digests of the files of tensors, taken while they were written.

    Args:
        dtypes: of each parameter, by its name.
        compute: the values of a parameter, by its name.

    Raises:
        OSError: a file cannot be written.
        SimPOError: what `compute` raises.
    """
    writer = _Writer(folder, sync_files=False)
    with _causes_raised():
        # The format that every version of megatron-core reads; the newest writes another, which older ones cannot read.
        with (folder / COMMON_FILE).open("wb") as file:
            torch.save({"checkpoint_version": 3.0, "iteration": 0}, file)
        dcp.save({}, storage_writer=writer, planner=_Planner(model, dtypes, compute))
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return writer.digests


@contextmanager
def _causes_raised() -> Iterator[None]:
    """Raises the disk's error, or this package's, that torch has wrapped."""
    try:
        yield
    except (dcp.CheckpointException, RuntimeError) as error:
        first = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        cause: BaseException | None = first
        while cause is not None and not isinstance(cause, (OSError, SimPOError)):
            cause = cause.__context__
        if cause is None and isinstance(first, RuntimeError):
            # The message of torch's zip writer when a file took only a part of its bytes.
            cause = OSError(errno.EIO, f"torch: {first}")
        raise cause or first from error


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Turns off torch.save's CRC32, which torch.load never checks; COMMIT.json has a hash of the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Writer(dcp.FileSystemWriter):
    """torch's writer, one tensor at a time and hashed beside the write; torch's own holds many and clones each.

    Its index does not name the folder, which is renamed afterwards.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.digests: dict[str, manifest.Digest] = {}
        results, left = [], deque(plan.items)
        while left:
            name = f"__0_{len(self.digests)}{DEFAULT_SUFFIX}"
            with _without_crc32(), DirectFile(Path(self.path) / name, hashed=True) as file:
                while left and file.size < _SHARD_BYTES:
                    item, start = left.popleft(), file.size
                    # torch.save only needs write().
                    torch.save(planner.resolve_data(item), cast(IO[bytes], file))
                    place = _StorageInfo(name, start, file.size - start)
                    results.append(WriteResult(item.index, place.length, place))
            self.digests[name] = manifest.Digest(file.size, file.sha256)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> None:
        return None


class _Planner(SavePlanner):
    """Announces every parameter, and computes each when it is asked for."""

    def __init__(self, model: MetaModel, dtypes: dict[str, torch.dtype], compute: Callable[[str], Tensor]) -> None:
        self.model, self.dtypes = model, dtypes
        self.computed = (model.parts(name, compute(name)) for name in model.shapes)
        self.current: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                _write_item(part)
                for name, shape in self.model.shapes.items()
                for part in self.model.parts(name, torch.empty(shape, dtype=self.dtypes[name], device="meta"))
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of one item; items are asked for in their order."""
        if not self.current:
            self.current = {(part.key, part.offset): part.values for part in next(self.computed)}
        values = self.current.pop((write_item.index.fqn, tuple(write_item.index.offset or ())))
        # torch.save writes the whole storage of a view.
        return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


def _write_item(part: StoredPart) -> WriteItem:
    size = torch.Size(part.global_shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size(part.offset), sizes=part.values.shape)
    properties = TensorProperties(dtype=part.values.dtype)
    return WriteItem(
        index=MetadataIndex(part.key, part.offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
    )


class CheckpointReader:
    """The tensors of a distributed checkpoint, whatever layout wrote them."""

    def __init__(self, folder: Path, check: Callable[[str], None]) -> None:
        """`check` is called with each file's name before the file is read, and may raise.

        Raises: CheckpointError: the index of `folder` holds more than an index.
        """
        metadata = self._index = read_index(folder)
        self.folder, self._check = folder, check
        self.reader = dcp.FileSystemReader(folder)
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def tensor(self, part: StoredPart) -> TensorStorageMetadata:
        """The tensor that is stored under the key of `part`.

        Raises:
            CheckpointError: nothing, or a tensor of another shape; the rows that pad a vocabulary may differ in number.
        """
        stored = self.tensors.get(part.key)
        if stored is None:
            raise CheckpointError(f"{self.folder}: found no {part.key}, expected it in a model with this config.json")
        found, expected = tuple(stored.size), part.global_shape
        if part.num_true_rows is not None and len(found) == len(expected) and found[0] >= part.num_true_rows:
            expected = (found[0], *expected[1:])
        if found != expected:
            raise CheckpointError(
                f"{self.folder}: {part.key}: found shape {list(found)}, expected {list(expected)} by its config.json"
            )
        return stored

    def fill(self, part: StoredPart) -> None:
        """Fill the values of `part` from the checkpoint; rows that only padded the vocabulary may stay as they are.

        Raises:
            CheckpointError: a part of it is stored nowhere, or is no tensor.
        """
        stored = self.tensor(part)
        num_rows = max(0, min(part.values.shape[0], stored.size[0] - part.offset[0]))
        wanted = part.values[:num_rows]
        chunk = ChunkStorageMetadata(offsets=torch.Size(part.offset), sizes=wanted.shape)
        items = create_read_items_for_chunk_list(part.key, stored, [chunk])
        if sum(item.lengths.numel() for item in items) != wanted.numel():
            raise CheckpointError(f"{self.folder}: {part.key}: found a part of it in no file, expected all of it")
        for item in items:
            self._check(self.reader.storage_data[item.storage_index].relative_path)
        try:
            with cpu_patches.reading_by(self._index, read_torch_file):
                self.reader.read_data(LoadPlan(items), _Into(wanted)).wait()
        except StoppedBySignal:
            raise
        except Exception as error:  # what torch's reader and planner make of a file that is not as its index says
            raise CheckpointError(f"{self.folder}: {part.key}: cannot be read ({error}), expected a tensor") from None


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target
