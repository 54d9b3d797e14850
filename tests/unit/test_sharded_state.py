"""Pickles of a checkpoint are checked before they are read: an index of tensors, without calls."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from simpo_megatron.checkpoint import sharded_state  # noqa: E402
from simpo_megatron.checkpoint.tensor_index import read_index, refuse_other_weights  # noqa: E402
from simpo_megatron.checkpoint.torch_files import read_torch_file  # noqa: E402


def index(entry=None, file="__0_0.distcp", length=16):
    size = torch.Size([4])
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=size)
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, [chunk])
    stored = {MetadataIndex("weight", [0]): _StorageInfo(file, 0, length)}
    return Metadata({"weight": entry or tensor}, storage_data=stored)


def check(folder, content, stored=bytes(16)):
    (folder / "__0_0.distcp").write_bytes(stored)
    (folder / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    read_index(folder)


class Calls:
    """Pickles as a call of `function` on `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_an_index_of_tensors_passes(tmp_path):
    check(tmp_path, index())
    assert set(read_index(tmp_path).state_dict_metadata) == {"weight"}


def test_weights_that_are_no_part_of_the_model_are_named_and_a_runs_own_state_is_not(tmp_path):
    stored = {"weight", "optimizer.state.exp_avg.weight", "rng.torch", "common_state/shard_0_1"}
    refuse_other_weights(stored, {"weight"}, tmp_path)
    with pytest.raises(CheckpointError, match="found 1 tensors.*: linear_adapter.lora_A; of a run with adapters"):
        refuse_other_weights({*stored, "linear_adapter.lora_A"}, {"weight"}, tmp_path)


@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, getattr, torch.load, __import__])
def test_an_index_that_would_call_something_is_refused_and_calls_nothing(tmp_path, function):
    target = tmp_path / "made"
    argument = f"mkdir {target}" if function is os.system else f"__import__('os').mkdir('{target}')"
    arguments = (str(target),) if function is os.mkdir else (argument,)
    with pytest.raises(CheckpointError, match="found no index of tensors .it refers to"):
        check(tmp_path, Calls(function, *arguments))
    assert not target.exists()


def test_names_that_a_module_of_the_index_merely_imports_are_refused(tmp_path):
    for name in (b"io.BytesIO", b"abc", b"dataclass"):
        content = b"ctorch.distributed.checkpoint.planner\n" + name + b"\n."
        with pytest.raises(CheckpointError, match="it refers to"):
            check(tmp_path, content)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_settings(folder):
    """The object `settings` in `folder` as torch reads it under this package's restrictions."""
    state = {"settings": None}
    with cpu_patches.reading_by(read_index(folder), read_torch_file):
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["settings"]


def test_an_object_of_settings_passes_and_one_that_would_call_something_is_refused(tmp_path):
    target = tmp_path / "made"
    dcp.save({"settings": "three"}, checkpoint_id=tmp_path / "harmless", no_dist=True)
    assert load_settings(tmp_path / "harmless") == "three"
    dcp.save({"settings": Calls(os.mkdir, str(target))}, checkpoint_id=tmp_path / "harmful", no_dist=True)
    with pytest.raises(dcp.CheckpointException, match="it refers to posix.mkdir"):
        load_settings(tmp_path / "harmful")
    assert not target.exists()


def test_the_index_is_given_to_torch_as_values_that_were_read_once(tmp_path):
    dcp.save({"weight": torch.arange(6.0).reshape(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    found = read_index(tmp_path)
    own = dcp.FileSystemReader(tmp_path).read_metadata()
    assert found.state_dict_metadata == own.state_dict_metadata and found.storage_data == own.storage_data
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Calls(os.mkdir, str(tmp_path / "made"))))
    state = {"weight": torch.zeros(2, 3)}
    with cpu_patches.reading_by(found, read_torch_file):
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["weight"], torch.arange(6.0).reshape(2, 3)) and not (tmp_path / "made").exists()


# What sets an attribute of a class or function that an index may name, so that it means another thing when read again.
LEAVES_A_TRACE = {
    "of a function": b"ctorch.serialization\n_get_layout\n}X\x05\x00\x00\x00cache}sb.",
    "of a class": b"ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x01\x00\x00\x00ai\x07\n.",
    "of a table": b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb.",
    "of a dtype": b"ctorch\nfloat32\n}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb.",
}


@pytest.mark.parametrize("content", LEAVES_A_TRACE.values(), ids=LEAVES_A_TRACE)
def test_reading_an_index_leaves_no_trace_in_the_process(tmp_path, content):
    layout = torch.serialization._get_layout
    before = [dict(vars(thing)) for thing in (layout, Metadata)]
    with pytest.raises(CheckpointError, match="found no index of tensors"):
        check(tmp_path, content)
    assert [dict(vars(thing)) for thing in (layout, Metadata)] == before


@pytest.mark.parametrize("changes", [
    {"offset": -1}, {"length": 1 << 40}, {"offset": "0"}, {"offset": True}, {"relative_path": b"__0_0.distcp"},
])  # fmt: skip
def test_values_of_another_type_or_beyond_the_file_are_refused(tmp_path, changes):
    damaged = index()
    for name, value in changes.items():
        setattr(next(iter(damaged.storage_data.values())), name, value)
    with pytest.raises(CheckpointError, match="found no index of tensors"):
        check(tmp_path, damaged)


def test_entries_that_share_bytes_of_a_file_are_refused(tmp_path):
    shared = index()
    shared.storage_data[MetadataIndex("weight", [2])] = _StorageInfo("__0_0.distcp", 0, 16)
    with pytest.raises(CheckpointError, match="its entries share bytes of __0_0.distcp"):
        check(tmp_path, shared)


@pytest.mark.parametrize("file", ["../../secret", "/etc/passwd", "folder/__0_0.distcp", ".."])
def test_a_file_elsewhere_is_refused(tmp_path, file):
    with pytest.raises(CheckpointError, match="refers to the file"):
        check(tmp_path, index(file=file))


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps(3), pickle.dumps(None)])
def test_what_is_no_index_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="found no index of tensors"):
        check(tmp_path, content)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="found no index of tensors"):
        read_index(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of one tensor by megatron-core, and the one rank that wrote it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    cpu_patches.write_checkpoints_in_threads()
    dist_checkpointing.save({"iteration": 3, **one_tensor()}, str(folder))
    yield folder
    dist.destroy_process_group()


def one_tensor():
    return {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(4))}


@pytest.mark.parametrize("wrapped", [lambda call: call, lambda call: np.array([call], dtype=object)])
def test_settings_that_would_call_something_are_refused_and_call_nothing(checkpoint, tmp_path, wrapped):
    common = checkpoint / "common.pt"
    # The newest megatron-core keeps the settings elsewhere, and reads the file where an older version has left one.
    before, target = common.read_bytes() if common.exists() else None, tmp_path / "made"
    assert sharded_state._load(one_tensor(), read_index(checkpoint), checkpoint)["iteration"] == 3
    torch.save(wrapped(Calls(os.mkdir, str(target))), common)
    try:
        with pytest.raises(CheckpointError, match="does not fit this run"):
            sharded_state._load(one_tensor(), read_index(checkpoint), checkpoint)
    finally:
        common.unlink() if before is None else common.write_bytes(before)
    assert not target.exists()
    torch.load(io.BytesIO(saved(wrapped(Calls(os.mkdir, str(target))))), weights_only=False)
    assert target.exists()  # who would have loaded it would have called it
