"""The checks of a run's inputs before torch is loaded: from files alone, by the functions that ranks use afterwards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.manifest import RECORD_FILE, list_resumable
from simpo_megatron.checkpoint.model_source import find_model
from simpo_megatron.config import DEMO, Config, check_layout
from simpo_megatron.convert import check_model_files
from simpo_megatron.convert.stored_tensors import stored_tensors
from simpo_megatron.data.sources import check_kind, parse_named_sources, parse_sources
from simpo_megatron.data.store import check_first_records
from simpo_megatron.data.tokenizer_files import check_tokenizer_files
from simpo_megatron.demo import demo_files
from simpo_megatron.errors import CheckpointError, Refusals
from simpo_megatron.launched import is_launched
from simpo_megatron.mcore.families import require_family, stated_sizes
from simpo_megatron.mcore.hf import is_hub_name, read_hf_json
from simpo_megatron.reporting.loggers import check_sinks
from simpo_megatron.training.start.inputs import (
    check_exports,
    check_files,
    check_starting_again,
    demo_folder,
    named_inputs,
    require_positions,
)


def check_inputs(config: Config) -> None:
    """Return if what `config` names is there and fits together, as far as files on this machine tell it.

    It takes no torch, so that a mistake is told at once. Each check is the one that ranks make again where they use the
    file; `plan_run` looks at all of it. Of many ranks rank 0 alone looks into data, weights and tokenizer.

    Raises:
        ConfigError: no model or no data was named, the model cannot be trained so, it has no tokenizer, a job that
            starts again could not continue, or a package that logs is not installed.
        CheckpointError: the model's folder is not one, its weights are missing or not whole, an export would overwrite
            something, or the checkpoint to resume from is not there.
        DataError: a preference file is not there, cannot be read, holds nothing or begins with what is no pair.
    """
    check_sinks(config)
    check_starting_again(config)
    skips_content = is_launched() and os.environ.get("RANK") != "0"
    model, train, valid = _named_here(config)
    if model is not None and not os.path.exists(model):
        read_hf_json(model, "config.json")
    named_files = [files for files in (train, *parse_named_sources(valid).values()) if DEMO not in files]
    for files in named_files:
        check_files(files)
        for source in () if skips_content else parse_sources(files):
            check_kind(source.path)
    found = None if model is None else find_model(model, config.model.hf_config)
    if found is not None:
        hf_config = read_hf_json(found.files, "config.json")
        for folder in {found.files, found.tokenizer}:
            check_model_files(folder)
    check_exports(config, *(() if found is None else (found.files, found.base, *found.adapters)))
    # Of many ranks rank 0 alone looks, once they have met.
    if config.run.save is not None and not is_launched():
        _check_save(Path(config.run.save), config.run.resume)
    if found is not None:
        _check_fit(config, found.files, hf_config)
    if skips_content:
        return
    if found is not None:
        # Adapters that go on training may bring a tokenizer of their own.
        if config.lora.adapter is None:
            check_tokenizer_files(found.tokenizer)
        _check_weights(found.base, config)
    for source in itertools.chain(*map(parse_sources, named_files)):
        check_first_records(source.path, config.pairs)


def _named_here(config: Config) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """The same as `named_inputs`; the model is None, too, where it is on the hub, or the demo's and not yet written."""
    model, train, valid = named_inputs(config)
    if model == DEMO:
        written = demo_files(demo_folder(config)).model_dir
        model = str(written) if written.is_dir() else None
    return None if model is None or is_hub_name(model) else model, train, valid


def _check_fit(config: Config, folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Raises ConfigError where the model in `folder` cannot be trained as `config` says, as far as sizes tell it."""
    require_family(hf_config, str(folder / "config.json"))
    sizes = stated_sizes(hf_config)
    if sizes is None:
        return
    refusals, needed = Refusals(), config.parallel.sizes.min_world_size
    started = int(os.environ.get("WORLD_SIZE", 1))
    with refusals.collected():
        require_positions(config, sizes["max_position_embeddings"], folder)
    with refusals.collected():
        check_layout(config, world_size=needed if started == 1 else started, model=sizes)
    refusals.raise_any()


def _check_weights(folder: Path, config: Config) -> None:
    """Raises CheckpointError where safetensors of a model, which the run starts from, are missing or not whole."""
    run = config.run
    continues = run.save is not None and list_resumable(Path(run.save), run.resume)
    is_hf_folder = (folder / "config.json").is_file() and not (folder / RECORD_FILE).is_file()
    if is_hf_folder and not continues:
        stored_tensors(folder)


def _check_save(save: Path, resume: str) -> None:
    above = next(path for path in (save, *save.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise CheckpointError(
            f"save: found {save}, which cannot be written, expected a folder that can be written; name another"
        )
    list_resumable(save, resume)
