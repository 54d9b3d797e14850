"""Exports the weights of megatron's GPTModel as a Hugging Face folder; every pipeline stage writes its own files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.convert.expert_exchange import ExpertExchange
from simpo_megatron.convert.files import TensorSpec, write_safetensors
from simpo_megatron.convert.folder import (
    MAX_SHARD_BYTES,
    complete_folder,
    divide,
    file_names,
    new_output,
    refuse_existing_export,
)
from simpo_megatron.convert.mapping import (
    Piece,
    dtype_in_folder,
    hf_tensors,
    pieces,
    stage_tensors,
)
from simpo_megatron.convert.weight_layouts import TensorRank
from simpo_megatron.errors import CheckpointError, NumericsError, SimPOError
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import gather_or_raise, raise_on_all_ranks

Result = TypeVar("Result")

Files = dict[str, dict[str, TensorSpec]]
"""The tensors of each weight file, by its name."""


@dataclass(frozen=True)
class _Shard:
    """One file of an export, written by one pipeline stage."""

    file_name: str
    stage: int
    specs: dict[str, TensorSpec]


def export_hf(
    model_chunks: Sequence[torch.nn.Module],
    description: ModelDescription,
    source_folder: str | Path,
    out_folder: str | Path,
    *,
    groups: ParallelGroups,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    model_card: str | None = None,
    chat_template: str | None = None,
    tokenizer_folder: Path | None = None,
    in_place_of: Mapping[Tensor, Tensor] | None = None,
    origin: str | None = None,
) -> None:
    """Write the model as a Hugging Face folder that appears under `out_folder` only when it is whole.

    Adapters are merged into the written weights, in fp32; the model stays as it is. Every pipeline stage writes its own
    files, one tensor in memory at a time. Configuration, tokenizer and chat template come from `source_folder`, the
    latter two from `tokenizer_folder` if given; `chat_template` replaces the last, and `model_card` becomes README.md.
    `in_place_of` maps parameters, those kept in FP8, to the tensors to write for them. An earlier export of the same
    `origin` is replaced, any other one is renamed. Called on every rank; ranks that hold replicas of other ranks'
    weights return at once.

    Collectives: one gather over tp for every sharded tensor, one send over ep for every expert that another rank
    holds; a few small objects over tp, pp and ep.

    Raises:
        CheckpointError: on every rank that takes part, when `out_folder` holds anything but an earlier export, or one
            of them cannot write.
        NumericsError: on every rank that takes part, when a weight is not finite.
    """
    owned: dict[str, list[Piece]] = {}
    tp = TensorRank(groups.tp.rank(), groups.tp.size())
    for chunk in model_chunks:
        for name, found in _pieces_by_name(chunk, description, tp, in_place_of).items():
            owned.setdefault(name, found)
    specs = {
        name: TensorSpec(shape, dtype_in_folder(name, description, dtype))
        for name, shape in hf_tensors(description).items()
    }
    stage_names = set().union(*(_stage_names(chunk, description) for chunk in model_chunks))

    def complete(staging: Path, files: Files) -> None:
        source = Path(source_folder)
        complete_folder(
            staging, source, description.hf_config, files, model_card, chat_template, tokenizer_folder or source
        )

    export_tensors(
        owned,
        specs,
        description,
        out_folder,
        complete,
        groups=groups,
        max_shard_bytes=max_shard_bytes,
        stage_names=stage_names,
        origin=origin,
    )


def export_tensors(
    owned: Mapping[str, list[Piece]],
    specs: dict[str, TensorSpec],
    description: ModelDescription,
    out_folder: str | Path,
    complete: Callable[[Path, Files], None],
    *,
    groups: ParallelGroups,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stage_names: Collection[str] | None = None,
    origin: str | None = None,
) -> None:
    """Write tensors that ranks hold in `owned` pieces as a folder that appears only when it is whole.

    Args:
        specs: all tensors of the folder, the same on every rank; each is owned by one pipeline stage.
        complete: called on rank 0 with the staged folder of weight files, before it is published.
        stage_names: the names of all tensors of this stage, if other ranks own experts of it; None: `owned` is all.
        origin: as `export_hf`.

    Collectives and Raises: as `export_hf`.
    """
    holds_copies = groups.dp_cp.rank() != 0
    experts = [name for name, (piece, *_) in owned.items() if piece.layout.is_expert]
    # The first of the expert-parallel groups of a stage begins with the rank that writes.
    lends_experts = groups.ep.size() > 1 and groups.expert_dp.rank() == 0
    exchange = ExpertExchange.of(experts, groups.ep) if lends_experts else None
    source = _Source(owned, description, groups.tp, exchange)
    if holds_copies:
        if exchange is not None and exchange.proceeds(False):
            for name in sorted(experts, key=list(specs).index):
                source.tensor(name, specs[name])
        return
    out_folder = Path(out_folder)
    shards = _plan_shards(specs, list(owned if stage_names is None else stage_names), max_shard_bytes, groups=groups)
    is_committer = groups.tp.rank() == 0 and groups.pp.rank() == 0
    with ExitStack() as stack:
        staging = None
        try:
            staging = _on_committer(lambda: _begin(out_folder, stack, origin), is_committer, groups)
        finally:
            if exchange is not None:
                exchange.proceeds(staging is not None)
        failure: SimPOError | None = None
        for shard in shards:
            if shard.stage == groups.pp.rank():
                tensors = (source.tensor(name, spec) for name, spec in shard.specs.items())
                failure = _write_or_drain(staging / shard.file_name, shard, tensors, groups, failure)
        raise_on_all_ranks(lambda: _raise(failure), groups.tp, groups.pp)
        files = {shard.file_name: shard.specs for shard in shards}
        _on_committer(lambda: complete(staging, files), is_committer, groups)
        _on_committer(stack.close, is_committer, groups)


_EMBEDDING = "model.embed_tokens.weight"
_FAILED = "export: failed, nothing was written"


def _pieces_by_name(
    chunk: torch.nn.Module, description: ModelDescription, tp: TensorRank, in_place_of: Mapping[Tensor, Tensor] | None
) -> dict[str, list[Piece]]:
    """The pieces that `chunk` adds to an export from this rank; a tied head adds none."""
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces(chunk, description, tp=tp, in_place_of=in_place_of):
        by_name.setdefault(piece.hf_name, []).append(piece)
    if not _has_embedding(chunk, description):
        by_name.pop(_EMBEDDING, None)
    return by_name


def _stage_names(chunk: torch.nn.Module, description: ModelDescription) -> set[str]:
    """Names of the tensors that `chunk` and those of the stage's other ranks add together."""
    names = stage_tensors(chunk, description)
    return names if _has_embedding(chunk, description) else names - {_EMBEDDING}


def _has_embedding(chunk: torch.nn.Module, description: ModelDescription) -> bool:
    return bool(chunk.pre_process) or not description.gpt["share_embeddings_and_output_weights"]


@dataclass(frozen=True)
class _Source:
    """The source of an export's tensors on this rank."""

    owned: Mapping[str, list[Piece]]
    description: ModelDescription
    tp_group: dist.ProcessGroup
    exchange: ExpertExchange | None
    """None where experts are not divided, or this rank's are copies."""

    def tensor(self, name: str, spec: TensorSpec) -> Tensor | None:
        """The whole Hugging Face tensor on the CPU of the rank that writes; None on the others.

        Collectives: those of `gather_tensor`, or one send over ep for another rank's expert, or one gather over ep
        for those of all ranks in one tensor.
        """
        own = self.owned.get(name)
        if self.exchange is None or name not in self.exchange.owners:
            # Only the owner of an expert and the rank that writes take part.
            return None if own is None else gather_tensor(own, self.description, spec.dtype, tp_group=self.tp_group)
        if own is not None and own[0].layout.is_stacked:
            parts = [piece.view.reshape(piece.hf_shape).to(spec.dtype) for piece in own]
            brought = self.exchange.join(torch.cat(parts))
        else:
            expert = None if own is None else own[0].view.reshape(spec.shape).to(spec.dtype).contiguous()
            brought = self.exchange.bring(name, expert, spec.shape, spec.dtype)
        return None if brought is None else brought.cpu()


def _plan_shards(
    specs: dict[str, TensorSpec], own_names: list[str], max_shard_bytes: int, *, groups: ParallelGroups
) -> list[_Shard]:
    """The files of the whole export, the same on every rank: each stage's tensors, split at `max_shard_bytes`.

    Collectives: one exchange of names over pp.
    """
    names_of_stages = gather_or_raise(lambda: own_names, groups.pp)
    parts: list[tuple[int, dict[str, TensorSpec]]] = []
    for stage, names in enumerate(map(set, names_of_stages)):
        own = {name: spec for name, spec in specs.items() if name in names}
        parts += [(stage, part) for part in divide(own, max_shard_bytes)]
    planned = sorted(name for _, part in parts for name in part)
    assert planned == sorted(specs), f"stages own {planned}, the model has {sorted(specs)}"
    return [_Shard(name, *part) for name, part in zip(file_names(len(parts)), parts, strict=True)]


def gather_tensor(
    pieces_of_tensor: list[Piece],
    description: ModelDescription,
    dtype: torch.dtype,
    *,
    tp_group: dist.ProcessGroup,
) -> Tensor | None:
    """The whole Hugging Face tensor on the CPU of the group's first rank; None on the others.

    Collectives: one gather over tp for every sharded piece.
    """
    parts = []
    is_first = tp_group.rank() == 0
    for piece in pieces_of_tensor:
        part = piece.view.reshape(piece.hf_shape)
        if piece.added is not None:
            part = part.float() + piece.added()
        part = part.to(dtype).contiguous()
        if piece.rows_of_ranks:
            part = _gather_uneven(part, [num_rows for _, num_rows in piece.rows_of_ranks], tp_group)
        elif piece.layout.cut is not None and tp_group.size() > 1:
            slices = [torch.empty_like(part) for _ in range(tp_group.size())] if is_first else []
            dist.gather(part, slices or None, dst=dist.get_global_rank(tp_group, 0), group=tp_group)
            if is_first:
                part = torch.cat([slice_.cpu() for slice_ in slices], dim=piece.layout.cut)
        if piece.layout.is_vocabulary:
            part = part[: description.vocab_size]
        parts.append(part)
    if not is_first:
        return None
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).cpu()


def _gather_uneven(part: Tensor, num_rows: list[int], tp_group: dist.ProcessGroup) -> Tensor:
    """On the group's first rank the rows of all ranks in order, on the CPU; on the others their own rows.

    Collectives: one gather over tp, padded to the rows of the rank that has most.
    """
    padded = part.new_zeros(max(num_rows), *part.shape[1:])
    padded[: len(part)] = part
    is_first = tp_group.rank() == 0
    slices = [torch.empty_like(padded) for _ in num_rows] if is_first else None
    dist.gather(padded, slices, dst=dist.get_global_rank(tp_group, 0), group=tp_group)
    if slices is None:
        return part
    return torch.cat([rows[:number].cpu() for rows, number in zip(slices, num_rows, strict=True)])


def _write_or_drain(
    path: Path,
    shard: _Shard,
    tensors: Iterator[Tensor | None],
    groups: ParallelGroups,
    failure: SimPOError | None,
) -> SimPOError | None:
    """The error of writing, now or before, if any. A rank that cannot write still gathers: its peers wait there."""
    if groups.tp.rank() == 0 and failure is None:
        try:
            # On this rank every tensor is there.
            write_safetensors(path, shard.specs, cast(Iterator[Tensor], tensors))
        except NumericsError as error:
            failure = NumericsError(f"{_FAILED}: {error}")
        except (OSError, CheckpointError) as error:
            failure = CheckpointError(f"{_FAILED}: {error}")
    for _ in tensors:
        pass
    return failure


def _begin(out_folder: Path, stack: ExitStack, origin: str | None) -> Path:
    """The draft folder to write into; it becomes `out_folder` when `stack` is closed without an error."""
    refuse_existing_export(out_folder)
    return stack.enter_context(new_output(out_folder, origin))


def _on_committer(work: Callable[[], Result], is_committer: bool, groups: ParallelGroups) -> Result:
    """The result of `work` on the rank that publishes the export, on every rank that takes part.

    Collectives: those of `gather_or_raise` over tp and pp.

    Raises:
        CheckpointError: on every rank alike, it failed.
    """

    def attempt() -> Result | None:
        if not is_committer:
            return None
        try:
            return work()
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"{_FAILED}: {error}") from error

    return cast(Result, gather_or_raise(attempt, groups.tp, groups.pp)[0])


def _raise(failure: SimPOError | None) -> None:
    if failure is not None:
        raise failure
