"""Loads the weights of a Hugging Face folder into megatron's GPTModel; each rank reads its own slices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from simpo_megatron.convert.files import DTYPE_NAMES, require_finite
from simpo_megatron.convert.mapping import Piece, hf_tensors, pieces
from simpo_megatron.convert.stored_tensors import StoredTensor, open_safetensors, stored_tensors
from simpo_megatron.convert.weight_layouts import TensorRank
from simpo_megatron.errors import CheckpointError, listed
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.fp8_weights import awaited_values

MAX_LISTED = 10
"""Names in an error message before it only counts."""

MAX_MAPPED_BYTES = 256 << 20
"""Bytes of a weight file, counted in the parameters' dtype, that loading holds in memory at a time."""


def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module],
    folder: str | Path,
    description: ModelDescription,
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill this rank's parameters in place from the safetensors of `folder`, reading only what they need.

    Stored values are cast to each parameter's dtype. Padded vocabulary rows become zero. For a weight kept in FP8, the
    values that become its fp32 masters are filled instead (`mcore.fp8_weights`).

    Raises:
        CheckpointError: a tensor is missing, extra or misshapen (ten are named), or a file unreadable.
        NumericsError: a weight is not finite; its file and tensor are named.
    """
    stored = checked_tensors(folder, description, tp_rank=tp_rank, tp_size=tp_size)
    awaited = awaited_values(model_chunks)
    wanted: dict[Path, list[Piece]] = {}
    for chunk in model_chunks:
        for piece in pieces(chunk, description, tp=TensorRank(tp_rank, tp_size), in_place_of=awaited):
            wanted.setdefault(stored[piece.hf_name].file, []).append(piece)
    for path, pieces_of_file in wanted.items():
        for batch in _batches(pieces_of_file, tp_size):
            with open_safetensors(path) as file:
                for piece in batch:
                    fill(piece, file.get_slice(piece.hf_name), tp_rank, description)
                    require_finite(piece.view, f"{path}: {piece.hf_name}")


def checked_tensors(
    folder: str | Path, description: ModelDescription, *, tp_rank: int = 0, tp_size: int = 1
) -> dict[str, StoredTensor]:
    """The place of each tensor of the model in `folder`; if a tied head is stored too, each rank compares its shard.

    Raises:
        CheckpointError: as `load_hf_weights`.
    """
    stored = stored_tensors(folder)
    _refuse_unexpected(stored, description, folder)
    _refuse_second_head(stored, description, tp_rank, tp_size)
    return stored


def _batches(pieces_of_file: list[Piece], tp_size: int) -> Iterator[list[Piece]]:
    """The pieces in turn, as many at a time as MAX_MAPPED_BYTES allow; the file is unmapped in between."""
    batch: list[Piece] = []
    num_bytes = 0
    for piece in pieces_of_file:
        # A slice of columns touches every page of its tensor.
        touched = piece.view.nbytes * (tp_size if piece.layout.cut == 1 else 1)
        if batch and num_bytes + touched > MAX_MAPPED_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(piece)
        num_bytes += touched
    yield batch


def fill(piece: Piece, stored: Any, tp_rank: int, description: ModelDescription) -> None:
    """Copy this rank's part of one Hugging Face tensor, `stored` or a slice of its file, into the piece's view."""
    start, length = piece.first_row, piece.hf_shape[0]
    if piece.layout.cut == 1:
        width = piece.hf_shape[1]
        piece.view.copy_(stored[:, tp_rank * width : (tp_rank + 1) * width].view(piece.view.shape))
        return
    if piece.rows_of_ranks:
        start, length = piece.rows_of_ranks[tp_rank]
    elif piece.layout.cut == 0:
        start += tp_rank * length
    if piece.layout.is_vocabulary:
        num_rows = min(max(description.vocab_size - start, 0), length)
        piece.view[num_rows:].zero_()
        if num_rows:
            piece.view[:num_rows].copy_(stored[start : start + num_rows])
        return
    piece.view.copy_(stored[start : start + length].view(piece.view.shape))


def _refuse_unexpected(stored: dict[str, StoredTensor], description: ModelDescription, folder: str | Path) -> None:
    expected = hf_tensors(description)
    problems = [f"{name} is missing" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            if not _may_be_ignored(name, description):
                problems.append(f"{name} is not part of a {description.family} model with this config.json")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype not in DTYPE_NAMES.values():
            problems.append(f"{name} is stored as {tensor.dtype}, expected one of {', '.join(DTYPE_NAMES.values())}")
    if problems:
        found = listed(problems, MAX_LISTED, "; ")
        raise CheckpointError(f"{folder}: found weights of another model than config.json, expected its own: {found}")


def _may_be_ignored(name: str, description: ModelDescription) -> bool:
    """True for what adds nothing: rotary frequencies of old files, a head that is the embedding again, and layers past
    the last one, which predict further tokens and which transformers leaves out as well."""
    past_the_last = re.match(r"model\.layers\.(\d+)\.", name)
    if past_the_last and int(past_the_last[1]) >= description.transformer["num_layers"]:
        return bool(description.hf_config.get("num_nextn_predict_layers"))
    if name == "lm_head.weight":
        return description.gpt["share_embeddings_and_output_weights"]
    return name.endswith(".rotary_emb.inv_freq")


def _refuse_second_head(
    stored: dict[str, StoredTensor], description: ModelDescription, tp_rank: int, tp_size: int
) -> None:
    """Return if a head stored beside its tied embedding equals it; each rank compares its shard."""
    if "lm_head.weight" not in stored or not description.gpt["share_embeddings_and_output_weights"]:
        return
    first, last = (description.vocab_size * rank // tp_size for rank in (tp_rank, tp_rank + 1))
    rows = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with open_safetensors(stored[name].file) as file:
            rows.append(file.get_slice(name)[first:last])
    if not torch.equal(*rows):
        raise CheckpointError(
            f"{stored['lm_head.weight'].file}: found an lm_head.weight that differs from model.embed_tokens.weight, "
            "expected the same with tie_word_embeddings true; set it to false in config.json or remove the head"
        )
