"""The tensors of a run in the form that megatron-core's dist_checkpointing stores and loads under any layout.

Frozen weights, such as the model's beside adapters, are not stored: a resumed run reads them from the model's folder.

Only tensors are stored: megatron would unpickle an object without a check. State that Transformer Engine keeps as
objects (FP8 scaling histories) starts anew on a resume.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from simpo_megatron.checkpoint.manifest import Checkpoint
from simpo_megatron.checkpoint.save_strategy import SaveStrategy
from simpo_megatron.checkpoint.tensor_index import read_index, refuse_other_names, refuse_other_weights
from simpo_megatron.checkpoint.torch_files import read_torch_file
from simpo_megatron.errors import CheckpointError, StoppedBySignal, listed
from simpo_megatron.mcore import cpu_patches, device
from simpo_megatron.mcore.fp8_weights import awaited_values, quantise_masters, whole_masters
from simpo_megatron.mcore.layers import weights_of
from simpo_megatron.mcore.lora import ADAPTER_SUFFIX
from simpo_megatron.mcore.model import PreferenceGPTModel
from simpo_megatron.mcore.optimizer import gather_parameters
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import names_of_all_ranks

# What megatron's schedule reads of a group.
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")


class FailedAloneError(CheckpointError):
    """A failure on this rank that others may not know of: they may wait for it, so the run cannot go on."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The parts of a run that a checkpoint holds, on this rank."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    groups: ParallelGroups

    @property
    def model(self) -> list[PreferenceGPTModel]:
        """The chunks without their DDP wrappers."""
        return [chunk.module for chunk in self.chunks]


def request_write(
    state: RunState, iteration: int, folder: Path, strategy: SaveStrategy
) -> tuple[AsyncRequest, set[int]]:
    """(a request to write this rank's share of the run's tensors into the empty `folder`, the storages it reads).

    All ranks must see `folder`. The storages, by address, are the state itself where that lies in the host's memory: a
    step changes them.

    Args:
        strategy: that of the run's earlier saves.

    Collectives: megatron's and that of `SaveStrategy.of_save`, world.

    Raises:
        FailedAloneError: on this rank.
    """
    gather_parameters(state.chunks)
    cpu_patches.write_checkpoints_in_threads()
    cpu_patches.drop_warning_of_incomplete_folder()
    sharded = {"checkpoint_version": 3.0, "iteration": iteration, **_sharded_state(state)}
    _put_in_place(sharded, whole_masters(state.optimizer))
    sharded["opt_param_scheduler"] = state.scheduler.state_dict()
    sharded["rng"] = _sharded_rng()
    tensors = list(_tensors(sharded))
    held = [tensor.data for tensor in tensors]
    storages = {data.untyped_storage().data_ptr() for data in held if data.device.type == "cpu"}
    of_save, validates = strategy.of_save(tensors)
    # megatron-core 0.17 and newer would try NVIDIA's resiliency package first.
    takes_strategy = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    options = {"async_strategy": "mcore"} if takes_strategy else {}
    with described(folder):
        request = dist_checkpointing.save(
            sharded,
            str(folder),
            of_save,
            validate_access_integrity=validates,
            async_sharded_save=True,
            content_metadata=_content(),
            **options,
        )
    return request, storages


@contextmanager
def described(folder: Path) -> Iterator[None]:
    """Raises megatron's errors while it writes into `folder` as errors of this package.

    Raises:
        CheckpointError: on every rank alike, a rank could not write its share.
        FailedAloneError: anything else.
    """
    try:
        yield
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: could not be written ({_reason(error)})") from error
    except StoppedBySignal:
        raise
    except Exception as error:
        raise FailedAloneError(f"{folder}: could not be written ({_reason(error)})") from error


def read_state(state: RunState, checkpoint: Checkpoint, *, same_layout: bool) -> None:
    """Fill model, moments and schedule of `state` from `checkpoint`, and with the `same_layout` the random states.

    Hyper-parameters stay those of the configuration.

    Collectives: those of `names_of_all_ranks` and megatron's, world.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or is no part of the model.
    """
    folder = checkpoint.folder
    # Rank 0 listed the folder. Listings by every rank would cost the square of the number of ranks.
    index = read_index(folder, {name: digest.size for name, digest in checkpoint.files.items()})
    optimizer = state.optimizer
    own_settings = [_settings(group) for group in optimizer.param_groups]
    sharded = _sharded_state(state, is_loading=True)
    if same_layout:
        sharded["rng"] = _sharded_rng()
    loaded = _load(sharded, index, folder)
    for name, chunk in _named_chunks(state.model):
        _load_chunk(chunk, loaded[name], folder)
    # megatron-core 0.19 tells groups apart by their rates too, which another configuration may have changed.
    for group in _stored_groups(loaded["optimizer"]):
        group.update({name: own_settings[0][name] for name in _RATES if name in group and name in own_settings[0]})
    optimizer.load_state_dict(loaded["optimizer"])
    quantise_masters(state.chunks, optimizer)
    for group, settings in zip(optimizer.param_groups, own_settings, strict=True):
        group.update(settings)
    state.scheduler.step(increment=checkpoint.iteration)
    if same_layout:
        restore_rng(loaded["rng"])


def read_weights(model: list[PreferenceGPTModel], groups: ParallelGroups, folder: Path) -> None:
    """Fill only the model from `folder`; adapters stay as they are.

    Collectives: megatron's, world.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or is no part of the model.
    """
    index = read_index(folder)
    stored = set(index.state_dict_metadata)
    refuse_other_weights(stored, {name for name in stored if ADAPTER_SUFFIX not in name}, folder)
    state = _sharded_model(model, groups, is_object)
    adapters, awaited = {}, awaited_values(model)
    for name, chunk in _named_chunks(model):
        adapters[name] = {key: value for key, value in chunk.state_dict().items() if ADAPTER_SUFFIX in key}
        state[name] = {key: value for key, value in state[name].items() if key not in adapters[name]}
        weights = dict(weights_of(chunk))
        for key in state[name]:
            # Rows that pad the vocabulary are not stored for every number of ranks.
            awaited.get(weights[key], weights[key].detach()).zero_()
    loaded = _load(state, index, folder)
    for name, chunk in _named_chunks(model):
        _load_chunk(chunk, {**adapters[name], **loaded[name]}, folder)
        weights = dict(weights_of(chunk))
        for key, values in loaded[name].items():
            if weights[key] in awaited:
                awaited[weights[key]].copy_(values)


def _load(state: dict[str, Any], index: Metadata, folder: Path) -> dict[str, Any]:
    """megatron's load, after a check of all ranks' names: its own does not work with torch 2.14 and later."""
    own = {tensor.key for tensor in _tensors(state)}
    stored = set(index.state_dict_metadata)
    refuse_other_names(stored, names_of_all_ranks(own, stored), folder)
    try:
        with cpu_patches.reading_by(index, read_torch_file):
            return dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{folder}: found a checkpoint that does not fit this run ({_reason(error)}), expected one of its model"
        ) from error


def _tensors(state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from _tensors({"": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def _sharded_state(state: RunState, *, is_loading: bool = False) -> dict[str, Any]:
    """Model and optimizer, each tensor with its place in the whole."""
    sharded = _sharded_model(state.model, state.groups, _is_left_out)
    if is_loading:
        for optimizer in state.optimizer.chained_optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                # torch's AdamW has no state to describe before its first step.
                optimizer._init_optimizer_states_with_dummy_values()
    metadata = sharding_metadata(state.groups)
    sharded["optimizer"] = state.optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata)
    return sharded


def is_object(value: Any) -> bool:
    """True for what a chunk's state holds beside tensors."""
    return isinstance(value, ShardedObject)


def _is_left_out(value: Any) -> bool:
    """True for objects in a chunk's state, and for weights that nothing trains."""
    weight = getattr(value, "data", None)
    return is_object(value) or (isinstance(weight, torch.nn.Parameter) and not weight.requires_grad)


def _sharded_model(
    model: list[PreferenceGPTModel], groups: ParallelGroups, leave_out: Callable[[Any], bool]
) -> dict[str, Any]:
    """Every parameter that is not to be left out, with its place in the whole."""
    return {
        name: extract_matching_values(chunk.sharded_state_dict(metadata=sharding_metadata(groups)), leave_out)[1]
        for name, chunk in _named_chunks(model)
    }


def _put_in_place(state: dict[str, Any], masters: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Store the `masters` of weights that are kept in FP8, as a run does that keeps them in bf16."""
    held = {id(weight): values for weight, values in masters.items()}
    for value in nested_values(state):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and id(value.data) in held:
            value.data = held.pop(id(value.data))
    assert not held, f"{len(held)} FP8 weights are not part of the state"


def sharding_metadata(groups: ParallelGroups) -> dict[str, Any]:
    """Facts of the run that a chunk's sharded_state_dict asks for."""
    return {**_content(), "dp_cp_group": groups.dp_cp}


def _content() -> dict[str, Any]:
    """The format of the distributed optimizer's state: whole tensors, which any layout can read."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _named_chunks(model: list[PreferenceGPTModel]) -> list[tuple[str, PreferenceGPTModel]]:
    """The chunks under Megatron's names for them."""
    if len(model) == 1:
        return [("model", model[0])]
    return [(f"model{number}", chunk) for number, chunk in enumerate(model)]


def _load_chunk(chunk: PreferenceGPTModel, state: Mapping[str, Any], folder: Path) -> None:
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    frozen = {name for name, values in weights_of(chunk) if not values.requires_grad}
    problems = [name for name in missing if name not in frozen and not name.endswith("_extra_state")] + unexpected
    if problems:
        raise CheckpointError(
            f"{folder}: found names that are not the model's, expected its own: {listed(sorted(problems), 10)}"
        )


def _reason(error: BaseException) -> str:
    """One line on the failure; torch gathers those of all ranks, but only on rank 0."""
    if isinstance(error, CheckpointException):
        told = [f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()]
        return "; ".join(told) or "rank 0 tells why"
    return f"{type(error).__name__}: {error}"


def _stored_groups(state: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    """The groups of parameters in the state of an optimizer, or of several in one."""
    for name, value in state.items():
        if name == "param_groups":
            yield from value
        elif isinstance(value, Mapping):
            yield from _stored_groups(value)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of an optimizer's group, without what training changes."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _sharded_rng() -> dict[str, ShardedTensor]:
    """This rank's random states; they are loaded only under the same number of ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state, (0, rank, world))
        for name, state in rng_states().items()
    }


def rng_states() -> dict[str, torch.Tensor]:
    """uint8 states on the CPU by name; python's and numpy's generators take no part in training."""
    states = {"torch": torch.get_rng_state()}
    if device.has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    return {**states, **{f"tracker.{name}": state.cpu() for name, state in tracked.items()}}


def restore_rng(states: Mapping[str, torch.Tensor]) -> None:
    """Make the random states on this rank those of `rng_states`."""
    torch.set_rng_state(states["torch"])
    if device.has_cuda():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    tracked = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states(tracked)
