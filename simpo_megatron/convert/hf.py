"""Weights from a Hugging Face folder into megatron's GPTModel and back, each rank handling its own slices."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron import __version__
from simpo_megatron.convert.files import (
    DTYPE_NAMES,
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    open_safetensors,
    stored_tensors,
    write_safetensors,
)
from simpo_megatron.convert.mapping import Piece, hf_tensors, pieces
from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.parallel import ParallelGroups

MAX_LISTED = 10
"""Names in an error message before it only counts."""

MAX_MAPPED_BYTES = 256 << 20
"""Bytes of a weight file, counted in the parameters' dtype, that loading holds in memory at a time."""

MARKER_FILE = "simpo_megatron.json"
"""What tells an export from a folder of the user's."""
_COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE*",
)


def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module],
    folder: str | Path,
    description: ModelDescription,
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill this rank's parameters in place from the safetensors of `folder`, reading only what they need.

    Stored values are cast to each parameter's dtype. Padded vocabulary rows become zero.

    Raises:
        CheckpointError: a tensor is missing, extra or misshapen (ten are named), or a file unreadable.
    """
    stored = stored_tensors(folder)
    _refuse_unexpected(stored, description, folder)
    _refuse_second_head(stored, description, tp_rank, tp_size)
    wanted: dict[Path, list[Piece]] = {}
    for chunk in model_chunks:
        for piece in pieces(chunk, description, tp_size=tp_size):
            wanted.setdefault(stored[piece.hf_name].file, []).append(piece)
    for path, pieces_of_file in wanted.items():
        for batch in _batches(pieces_of_file, tp_size):
            with open_safetensors(path) as file:
                for piece in batch:
                    _fill(piece, file.get_slice(piece.hf_name), tp_rank, description)


def _batches(pieces_of_file: list[Piece], tp_size: int) -> Iterator[list[Piece]]:
    """The pieces in turn, as many at a time as MAX_MAPPED_BYTES allow; the file is unmapped in between."""
    batch, num_bytes = [], 0
    for piece in pieces_of_file:
        # A slice of columns touches every page of its tensor.
        touched = piece.view.nbytes * (tp_size if piece.layout.cut == 1 else 1)
        if batch and num_bytes + touched > MAX_MAPPED_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(piece)
        num_bytes += touched
    yield batch


def _fill(piece: Piece, stored_slice, tp_rank: int, description: ModelDescription) -> None:
    """Copy this rank's part of one stored tensor into its view."""
    start, length = piece.first_row, piece.hf_shape[0]
    if piece.layout.cut == 1:
        width = piece.hf_shape[1]
        piece.view.copy_(stored_slice[:, tp_rank * width : (tp_rank + 1) * width].view(piece.view.shape))
        return
    if piece.layout.cut == 0:
        start += tp_rank * length
    if piece.layout.is_vocabulary:
        num_rows = min(max(description.vocab_size - start, 0), length)
        piece.view[num_rows:].zero_()
        if num_rows:
            piece.view[:num_rows].copy_(stored_slice[start : start + num_rows])
        return
    piece.view.copy_(stored_slice[start : start + length].view(piece.view.shape))


def _refuse_unexpected(stored: dict[str, StoredTensor], description: ModelDescription, folder: str | Path) -> None:
    expected = hf_tensors(description)
    problems = [f"{name} is missing" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            if not _may_be_ignored(name, description):
                problems.append(f"{name} is not part of a {description.family} model with this config.json")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, config.json makes it {list(expected[name])}")
        elif tensor.dtype not in DTYPE_NAMES.values():
            problems.append(f"{name} is stored as {tensor.dtype}, expected one of {', '.join(DTYPE_NAMES.values())}")
    if problems:
        more = len(problems) - MAX_LISTED
        listed = "; ".join(problems[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{folder}: weights and config.json do not belong together: {listed}")


def _may_be_ignored(name: str, description: ModelDescription) -> bool:
    """True for what adds nothing: rotary frequencies of old files, a head that is the embedding again."""
    if name == "lm_head.weight":
        return description.gpt["share_embeddings_and_output_weights"]
    return name.endswith(".rotary_emb.inv_freq")


def _refuse_second_head(
    stored: dict[str, StoredTensor], description: ModelDescription, tp_rank: int, tp_size: int
) -> None:
    """Nothing, when a head stored beside its tied embedding equals it; each rank compares its share."""
    if "lm_head.weight" not in stored or not description.gpt["share_embeddings_and_output_weights"]:
        return
    first, last = (description.vocab_size * rank // tp_size for rank in (tp_rank, tp_rank + 1))
    rows = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with open_safetensors(stored[name].file) as file:
            rows.append(file.get_slice(name)[first:last])
    if not torch.equal(*rows):
        raise CheckpointError(
            f"{stored['lm_head.weight'].file}: lm_head.weight differs from model.embed_tokens.weight, but "
            "config.json has tie_word_embeddings true; set it to false or remove the head"
        )


@dataclass(frozen=True)
class _Shard:
    """One file of an export, written by one pipeline stage."""

    file_name: str
    stage: int
    shapes: dict[str, tuple[int, ...]]


def export_hf(
    model_chunks: Sequence[torch.nn.Module],
    description: ModelDescription,
    source_folder: str | Path,
    out_folder: str | Path,
    *,
    groups: ParallelGroups,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 << 30,
    model_card: str | None = None,
) -> None:
    """Write the model as a Hugging Face folder that appears under `out_folder` only when it is whole.

    Every pipeline stage writes its own files, one tensor in memory at a time. Configuration, tokenizer and
    chat template come from `source_folder`; `model_card` becomes README.md. Called on every rank; those that
    hold a copy of another rank's weights return at once.

    Collectives: one gather over tp for every tensor that is cut; a few small objects over tp and pp.

    Raises:
        CheckpointError: on every rank that takes part, when `out_folder` holds anything but an earlier export, or one
            of them cannot write.
    """
    if groups.dp_cp.rank() != 0:
        return
    out_folder = Path(out_folder)
    owned: dict[str, list[Piece]] = {}
    for chunk in model_chunks:
        for name, found in _pieces_by_name(chunk, description, groups.tp.size()).items():
            owned.setdefault(name, found)
    shards = _plan_shards(hf_tensors(description), list(owned), dtype, max_shard_bytes, groups=groups)
    is_committer = groups.tp.rank() == 0 and groups.pp.rank() == 0
    staging = _agreed_staging_folder(out_folder, is_committer, groups)
    failure = None
    for shard in shards:
        if shard.stage == groups.pp.rank():
            tensors = (_gather(owned[name], description, dtype, tp_group=groups.tp) for name in shard.shapes)
            failure = _write_or_drain(staging / shard.file_name, shard, dtype, tensors, groups, failure)
    _raise_together(failure, staging, groups)
    if is_committer:
        failure = _attempt(_complete_folder, staging, Path(source_folder), shards, description, dtype, model_card)
        failure = failure or _attempt(_publish, staging, out_folder)
    _raise_together(failure, staging, groups)


def refuse_existing_export(out_folder: str | Path) -> None:
    """Nothing; for a caller that wants to know before it trains that `export_hf` will not refuse its folder.

    Raises:
        CheckpointError: `out_folder` exists and is neither empty nor an earlier export, which a new one replaces.
    """
    path = Path(out_folder)
    if not path.exists() or (path / MARKER_FILE).is_file():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise CheckpointError(
            f"{path}: exists already and is no export of simpo_megatron, which alone would be replaced; remove it or "
            "name another folder"
        )


def _pieces_by_name(chunk: torch.nn.Module, description: ModelDescription, tp_size: int) -> dict[str, list[Piece]]:
    """What `chunk` adds to an export; a head that shares the embedding's weight adds nothing."""
    is_tied = description.gpt["share_embeddings_and_output_weights"]
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces(chunk, description, tp_size=tp_size):
        by_name.setdefault(piece.hf_name, []).append(piece)
    if is_tied and not chunk.pre_process:
        by_name.pop("model.embed_tokens.weight", None)
    return by_name


def _plan_shards(
    shapes: dict[str, tuple[int, ...]],
    own_names: list[str],
    dtype: torch.dtype,
    max_shard_bytes: int,
    *,
    groups: ParallelGroups,
) -> list[_Shard]:
    """The files of the whole export, the same on every rank: each stage's tensors, cut at `max_shard_bytes`.

    Collectives: one exchange of names over pp.
    """
    names_of_stages = _all_gather_objects(own_names, groups.pp)
    parts: list[tuple[int, dict[str, tuple[int, ...]]]] = []
    for stage, names in enumerate(map(set, names_of_stages)):
        num_bytes = max_shard_bytes
        for name in (name for name in shapes if name in names):
            size = torch.Size(shapes[name]).numel() * dtype.itemsize
            if num_bytes + size > max_shard_bytes:
                parts.append((stage, {}))
                num_bytes = 0
            parts[-1][1][name] = shapes[name]
            num_bytes += size
    planned = sorted(name for _, part in parts for name in part)
    assert planned == sorted(shapes), f"stages own {planned}, the model has {sorted(shapes)}"
    if len(parts) == 1:
        return [_Shard(SINGLE_FILE, *parts[0])]
    return [
        _Shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", *part)
        for number, part in enumerate(parts, start=1)
    ]


def _gather(
    pieces_of_tensor: list[Piece],
    description: ModelDescription,
    dtype: torch.dtype,
    *,
    tp_group: dist.ProcessGroup,
) -> Tensor | None:
    """The whole Hugging Face tensor on the CPU of the group's first rank; None on the others.

    Collectives: one gather over tp for every piece that is cut.
    """
    parts = []
    is_first = tp_group.rank() == 0
    for piece in pieces_of_tensor:
        part = piece.view.reshape(piece.hf_shape).to(dtype).contiguous()
        if piece.layout.cut is not None and tp_group.size() > 1:
            slices = [torch.empty_like(part) for _ in range(tp_group.size())] if is_first else None
            dist.gather(part, slices, dst=dist.get_global_rank(tp_group, 0), group=tp_group)
            if is_first:
                part = torch.cat([slice_.cpu() for slice_ in slices], dim=piece.layout.cut)
        if piece.layout.is_vocabulary:
            part = part[: description.vocab_size]
        parts.append(part)
    if not is_first:
        return None
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).cpu()


def _write_or_drain(
    path: Path,
    shard: _Shard,
    dtype: torch.dtype,
    tensors: Iterator[Tensor | None],
    groups: ParallelGroups,
    failure: str | None,
) -> str | None:
    """Why writing failed, now or before. A rank that cannot write still gathers: its peers wait there."""
    if groups.tp.rank() == 0 and failure is None:
        failure = _attempt(write_safetensors, path, shard.shapes, dtype, tensors)
    for _ in tensors:
        pass
    return failure


def _complete_folder(
    staging: Path,
    source_folder: Path,
    shards: list[_Shard],
    description: ModelDescription,
    dtype: torch.dtype,
    model_card: str | None,
) -> None:
    """Everything beside the weights."""
    dtype_name = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in description.hf_config.items() if key != "auto_map"}
    config.update({key: dtype_name for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype_name})
    _write_json(staging / "config.json", config)
    if len(shards) > 1:
        weight_map = {name: shard.file_name for shard in shards for name in shard.shapes}
        num_bytes = (
            sum(torch.Size(shape).numel() for shard in shards for shape in shard.shapes.values()) * dtype.itemsize
        )
        _write_json(staging / INDEX_FILE, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    for pattern in _COPIED_FILES:
        for path in source_folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, staging / path.name)
    if model_card is not None:
        (staging / "README.md").write_text(model_card, encoding="utf-8")
    _write_json(staging / MARKER_FILE, {"exported_by": "simpo_megatron", "version": __version__})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(staging: Path, out_folder: Path) -> None:
    for path in staging.iterdir():
        _sync(path)
    _sync(staging)
    replaced = staging.with_suffix(".replaced")
    if out_folder.exists():
        os.rename(out_folder, replaced)
    os.rename(staging, out_folder)
    _sync(out_folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _agreed_staging_folder(out_folder: Path, is_committer: bool, groups: ParallelGroups) -> Path:
    """A new folder beside `out_folder`, made by one rank and known to all."""
    name, failure = None, None
    if is_committer:
        name = f".{out_folder.name}.{uuid.uuid4().hex}.tmp"
        failure = _attempt(refuse_existing_export, out_folder)
        failure = failure or _attempt((out_folder.parent / name).mkdir, parents=True)
    names = _all_gather_objects(_all_gather_objects(name, groups.tp), groups.pp)
    staging = out_folder.parent / names[0][0]
    _raise_together(failure, staging, groups)
    return staging


def _attempt(action, *args, **kwargs) -> str | None:
    """Why `action` could not do its work on this machine; None when it did."""
    try:
        action(*args, **kwargs)
    except (OSError, CheckpointError) as error:
        return str(error)
    return None


def _raise_together(failure: str | None, staging: Path, groups: ParallelGroups) -> None:
    """Nothing, when no rank failed; else the same error on all, and nothing left behind.

    Collectives: one exchange of a short text over tp, one over pp.
    """
    by_stage = _all_gather_objects(_all_gather_objects(failure, groups.tp), groups.pp)
    failures = [text for texts in by_stage for text in texts if text]
    if failures:
        if groups.tp.rank() == 0 and groups.pp.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"the export failed and left nothing behind: {failures[0]}")


def _all_gather_objects(value, group: dist.ProcessGroup) -> list:
    gathered = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered
