"""The weighted average of models that differ only in their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from simpo_megatron.checkpoint.model_facts import model_facts
from simpo_megatron.convert.folder import MAX_SHARD_BYTES, origin_of, refuse_existing_export
from simpo_megatron.data import PairOptions
from simpo_megatron.data.tokenization import load_tokenizer, tokenizer_identity
from simpo_megatron.errors import CheckpointError, ConfigError, listed
from simpo_megatron.offline.convert import write_hf
from simpo_megatron.offline.weights import Weights
from simpo_megatron.reporting.model_card import merged_model_card


def merge(
    models: Sequence[Weights],
    shares: Sequence[float],
    out_folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write sum(share * weights) / sum(shares) of `models` as a Hugging Face folder, in the dtypes of the first.

    Sums are fp32 (fp64 where a model is); memory: a few times the largest tensor. Configuration and tokenizer are the
    first model's.

    Raises:
        ConfigError: the shares do not make an average.
        CheckpointError: the models differ in architecture or tokenizer; `out_folder` cannot be written.
    """
    if len(models) != len(shares) or len(models) < 2 or not sum(shares) > 0 or not all(map(_is_finite, shares)):
        raise ConfigError(
            f"shares: found {list(shares)} for {len(models)} models, expected a finite share for each of two models or "
            "more, and a sum above 0"
        )
    refuse_existing_export(out_folder, *(folder for model in models for folder in (model.folder, model.named)))
    for other in models[1:]:
        _refuse_differences(models[0], other)
    fractions = [share / sum(shares) for share in shares]
    write_hf(
        out_folder,
        models[0].specs,
        lambda name: _average(models, fractions, name),
        like=models[0],
        title="write merged",
        max_shard_bytes=max_shard_bytes,
        model_card=merged_model_card(
            out_folder.name, [(share, model.named.name) for share, model in zip(fractions, models, strict=True)]
        ),
        origin=" ".join(origin_of(model.named) for model in models),
    )


def _average(models: Sequence[Weights], fractions: Sequence[float], name: str) -> Tensor:
    dtype = models[0].specs[name].dtype
    wide = torch.float64 if any(model.specs[name].dtype == torch.float64 for model in models) else torch.float32
    total = torch.zeros(models[0].specs[name].shape, dtype=wide)
    for model, fraction in zip(models, fractions, strict=True):
        total.add_(model.read(name).to(wide), alpha=fraction)
    return total.to(dtype)


def _refuse_differences(first: Weights, other: Weights) -> None:
    """Raises: CheckpointError, when the two cannot stand for one model, naming what differs."""
    before, after = model_facts(first.description), model_facts(other.description)
    problems = [
        f"{key} is {before.get(key)!r} and {after.get(key)!r}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]
    problems += [
        f"{name} has shape {list(spec.shape)} and {list(other.specs[name].shape)}"
        for name, spec in first.specs.items()
        if name in other.specs and other.specs[name].shape != spec.shape
    ]
    if not problems:
        problems = _tokenizer_differences(first.tokenizer, other.tokenizer)
    if problems:
        raise CheckpointError(
            f"{other.named}: found another kind of model than {first.named}, expected the same but for its weights: "
            f"{listed(problems, 10, '; ')}"
        )


def _tokenizer_differences(*folders: Path) -> list[str]:
    """The points in which two tokenizers disagree; none where neither folder has one."""
    has_one = [(folder / "tokenizer_config.json").is_file() for folder in folders]
    if not all(has_one):
        return ["only one has a tokenizer"] if any(has_one) else []
    first, other = (tokenizer_identity(load_tokenizer(folder), PairOptions()) for folder in folders)
    found = [key for key in first if key != "backend" and first[key] != other[key]]
    backends = first["backend"], other["backend"]
    found += [key for key in backends[0] | backends[1] if backends[0].get(key) != backends[1].get(key)]
    return [f"tokenizers differ in {key}" for key in found]


def _is_finite(share: float) -> bool:
    return abs(share) < float("inf")
