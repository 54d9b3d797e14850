"""Converts a Hugging Face folder to a Megatron checkpoint and back, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from simpo_megatron import __version__
from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.model_facts import model_facts
from simpo_megatron.checkpoint.run_config import write_run_config
from simpo_megatron.checkpoint.torch_dist import write_parameters
from simpo_megatron.convert.files import TensorSpec, require_finite, write_safetensors
from simpo_megatron.convert.folder import (
    MAX_SHARD_BYTES,
    complete_folder,
    copy_model_files,
    divide,
    file_names,
    new_output,
    origin_of,
    refuse_existing_export,
    write_config,
)
from simpo_megatron.convert.load_weights import fill
from simpo_megatron.convert.mapping import dtype_in_folder, pieces_of
from simpo_megatron.convert.weight_layouts import ALONE
from simpo_megatron.errors import CheckpointError, ConfigError
from simpo_megatron.logs import LOGGER
from simpo_megatron.mcore.hf import hub_name
from simpo_megatron.mcore.meta_model import MetaModel
from simpo_megatron.offline.progress import Transfer
from simpo_megatron.offline.weights import AdaptedWeights, MegatronWeights, Weights
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.reporting.loggers import METRICS_FILE
from simpo_megatron.reporting.model_card import card_of_checkpoint


def to_mcore(weights: Weights, out_folder: Path, groups: ParallelGroups, *, dtype: torch.dtype | None = None) -> None:
    """Write `weights` as a checkpoint of megatron-core, committed, that any layout reads.

    It is `out_folder`/release, with configuration and tokenizer; Megatron's pointer file beside it names it. Memory:
    three times the largest tensor, plus the libraries.

    Args:
        dtype: of all parameters; None leaves each tensor as it is stored.

    Raises:
        CheckpointError: `out_folder` exists, or cannot be written, or tensors that Megatron joins differ in dtype.
    """
    if out_folder.exists() and (not out_folder.is_dir() or any(out_folder.iterdir())):
        raise CheckpointError(
            f"{out_folder}: found a folder that already exists, expected none; remove it or name another"
        )
    model = MetaModel(weights.description, groups)
    dtypes = {
        name: dtype or _common_dtype(weights, {piece.hf_name for piece in _pieces(weights, model, name)})
        for name in model.shapes
    }
    num_bytes = sum(TensorSpec(shape, dtypes[name]).num_bytes for name, shape in model.shapes.items())
    with new_output(out_folder) as staging, Transfer("write megatron", num_bytes) as transfer:
        folder = staging / manifest.RELEASE
        folder.mkdir()

        def compute(name: str) -> Tensor:
            values = torch.empty(model.shapes[name], dtype=dtypes[name])
            for piece in _pieces(weights, model, name, values):
                fill(piece, weights.read(piece.hf_name), 0, weights.description)
                require_finite(piece.view, f"{weights.place(piece.hf_name)}: {piece.hf_name}")
            transfer.advance(values.nbytes)
            return values

        digests = write_parameters(model, dtypes, compute, folder)
        copy_model_files(weights.folder, folder, flat=True, tokenizer_folder=weights.tokenizer)
        write_config(folder, weights.description.hf_config)
        write_run_config(
            folder,
            weights.description,
            place=out_folder / manifest.RELEASE,
            dtype=next(iter(dtypes.values())),
            hub_id=hub_name(str(weights.named)),
        )
        facts = {"model": model_facts(weights.description), "converted_by": f"simpo_megatron {__version__}"}
        manifest.commit_weights_only(staging, facts, digests)


def to_hf(
    weights: Weights,
    out_folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `weights` as a Hugging Face folder; an earlier export there is replaced.

    A trained model gets the model card that its run would have written. Memory: three times the largest tensor, plus
    the libraries.

    Args:
        dtype: of all tensors; None leaves each as it is stored.

    Raises:
        CheckpointError: `out_folder` is something else, or cannot be written.
    """
    refuse_existing_export(out_folder, weights.folder, weights.named)
    specs = {
        name: replace(spec, dtype=dtype_in_folder(name, weights.description, dtype or spec.dtype))
        for name, spec in weights.specs.items()
    }
    write_hf(
        out_folder,
        specs,
        lambda name: weights.read(name).to(specs[name].dtype),
        like=weights,
        title="write hf",
        max_shard_bytes=max_shard_bytes,
        model_card=_card(weights, out_folder, dtype),
        origin=origin_of(weights.named),
    )


def write_hf(
    out_folder: Path,
    specs: Mapping[str, TensorSpec],
    tensor: Callable[[str], Tensor],
    *,
    like: Weights,
    title: str,
    max_shard_bytes: int,
    model_card: str | None,
    origin: str,
) -> None:
    """Write the tensors of `specs`, each computed by `tensor`, as a Hugging Face folder with the other files of `like`.

    Args:
        title: the name of the progress bar.
        origin: identifies the source of the export; an earlier export of the same source is replaced.

    Raises:
        CheckpointError: `out_folder` cannot be written.
    """
    parts = divide(specs, max_shard_bytes)
    files = dict(zip(file_names(len(parts)), parts, strict=True))
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    with new_output(out_folder, origin) as staging, Transfer(title, num_bytes) as transfer:

        def counted(name: str) -> Tensor:
            transfer.advance(specs[name].num_bytes)
            return tensor(name)

        for file, part in files.items():
            write_safetensors(staging / file, part, map(counted, part))
        config, tokenizer = like.description.hf_config, like.tokenizer
        complete_folder(staging, like.folder, config, files, model_card, tokenizer_folder=tokenizer)


def _card(weights: Weights, out_folder: Path, dtype: torch.dtype | None) -> str | None:
    checkpoint = weights.checkpoint if isinstance(weights, MegatronWeights | AdaptedWeights) else None
    if checkpoint is None:
        return None
    options, metrics = checkpoint.facts.get("config"), checkpoint.files.get(METRICS_FILE)
    if options is None:
        return None
    metrics_file = checkpoint.folder / METRICS_FILE if metrics is not None and metrics.size else None
    try:
        return card_of_checkpoint(options, metrics_file, out_folder, dtype)
    except ConfigError as error:
        # Options of another version: the model is written without its card.
        LOGGER.warning("no model card, as this version cannot read the run's options: %s", error)
        return None


def _pieces(weights: Weights, model: MetaModel, name: str, values: Tensor | None = None) -> list:
    values = torch.empty(model.shapes[name], device="meta") if values is None else values
    return pieces_of(model.chunk, name, values, weights.description, tp=ALONE)


def _common_dtype(weights: Weights, hf_names: set[str]) -> torch.dtype:
    dtypes = {weights.specs[name].dtype for name in hf_names}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{weights.folder}: found {', '.join(sorted(map(str, dtypes)))} for {', '.join(sorted(hf_names))}, "
            "expected one dtype, as they become one tensor of Megatron's; name it with --dtype"
        )
    return dtypes.pop()
