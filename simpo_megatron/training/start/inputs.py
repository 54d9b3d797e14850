"""The model and the pairs of a run: their places, and the checks of their names; torch is not needed for it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simpo_megatron.checkpoint.model_source import (
    HASHES_FILE,
    ModelSource,
    base_of,
    find_adapter,
    find_model,
    hf_config_of,
)
from simpo_megatron.config import DEMO, Config
from simpo_megatron.convert import refuse_existing_export
from simpo_megatron.data.sources import check_readable, parse_named_sources, parse_sources
from simpo_megatron.demo import demo_version, prepare_demo
from simpo_megatron.errors import ConfigError, DataError, require

STARTS_AGAIN = "SIMPO_STARTS_AGAIN"
"""Set by a launcher whose scheduler starts a job again that was stopped."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The places of the model and the pairs, the embedded default resolved to files."""

    model_source: ModelSource
    adapter: Path | None = None
    """Folder of the adapters that go on training, if there is one."""
    train: tuple[str, ...]
    valid: Mapping[str, Sequence[str]]
    """Validation files by the name of their set."""

    @property
    def model(self) -> Path:
        """The folder of config.json, and of the weights but those of Megatron-LM's checkpoints."""
        return self.model_source.files

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that the run reads of models: the base, what is added to it, and the adapters that go on training."""
        return (self.model_source.base, *self.model_source.adapters, *filter(None, (self.adapter,)))

    @property
    def tokenizer(self) -> Path:
        """The folder of tokenizer and chat template."""
        return replace(self.model_source, adapters=self.folders[1:]).tokenizer


def require_positions(config: Config, most_positions: int, folder: Path) -> None:
    """Raises ConfigError where pairs may be longer than the model in `folder` has positions."""
    require(
        config.pairs.max_length <= most_positions,
        "max_length",
        config.pairs.max_length,
        f"at most {most_positions}, the positions of the model in {folder}; lower it, and "
        f"max_prompt_length ({config.pairs.max_prompt_length}) below it",
    )


def check_starting_again(config: Config) -> None:
    """Refuse a run that a scheduler would start again and again from its first step."""
    if STARTS_AGAIN not in os.environ:
        return
    remedy = "or submit the job so that it is not queued again (sbatch --no-requeue)"
    if config.run.save is None:
        raise ConfigError(
            f"save: found none in a job that starts again after a stop, expected a folder to continue from; add --save "
            f"DIR, {remedy}"
        )
    if config.run.resume not in ("latest", "required"):
        raise ConfigError(
            f"resume: found {config.run.resume} in a job that starts again after a stop, expected latest, or each "
            f"start would be from there; leave it out, {remedy}"
        )


def check_exports(config: Config, *sources: Path) -> None:
    """Refuse exports that would replace the model, the run's own folder or each other.

    Args:
        sources: folders of the model, where they are known.

    Raises:
        ConfigError, CheckpointError: which export, and what is there.
    """
    exports = {"export_hf": config.model.export_hf, "export_adapter": config.lora.export_adapter}
    taken = [] if config.run.save is None else [Path(config.run.save).resolve()]
    for key, folder in exports.items():
        if folder is None:
            continue
        refuse_existing_export(folder, *sources)
        path = Path(folder).resolve()
        if any(path in (other, *other.parents) for other in taken):
            raise ConfigError(
                f"{key}: found {folder}, where the run or another export is, expected a folder of its own; name another"
            )
        taken.append(path)


def check_files(files: Sequence[str]) -> None:
    """Raises DataError when a preference file, all shards of it, is not there or cannot be read."""
    for source in parse_sources(files):
        check_readable(source.path)


def named_inputs(config: Config) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """(The model, training files, validation files) as they are named; None for the model that adapters name.

    Raises: ConfigError, when the model or all training files are missing.
    """
    if config.model.model is None and config.lora.adapter is None:
        raise ConfigError("model: found none, expected a Hugging Face folder; add --model DIR")
    if not config.data.data:
        raise ConfigError("data: found none, expected preference files; add --data FILE")
    return config.model.model, config.data.data, config.data.valid_data


def locate_sources(config: Config) -> Sources:
    """The files of the run. A rank that finds the embedded demo asked for and missing writes it first.

    Raises:
        ConfigError: no model or no data was named.
        DataError: the embedded demo cannot be written.
        CheckpointError: the model is a hub id that cannot be downloaded.
    """
    model, train, valid = named_inputs(config)
    if model == DEMO or DEMO in train:
        folder = demo_folder(config)
        try:
            assets = prepare_demo(folder)
        except OSError as error:
            raise DataError(
                f"data_cache: found {folder}, where the demo's model could not be written ({error.strerror or error}), "
                "expected a folder with room that can be written; name one with --data-cache"
            ) from None
        model = str(assets.model_dir) if model == DEMO else model
        if DEMO in train:
            train, valid = (str(assets.train_file),), valid or (str(assets.valid_file),)
    adapter = None if config.lora.adapter is None else find_adapter(config.lora.adapter)
    hf_config = config.model.hf_config
    if model is None and adapter is not None:
        model, hf_config = base_of(adapter), hf_config or hf_config_of(adapter)
    assert model is not None, "adapters name their model"
    source = find_model(model, hf_config)
    return Sources(model_source=source, adapter=adapter, train=train, valid=parse_named_sources(valid))


def demo_folder(config: Config) -> Path:
    """The folder of the embedded default, as this version of the package writes it."""
    return cache_folder(config) / f"demo-{demo_version()}"


def cache_folder(config: Config) -> Path:
    """The folder of tokenised pairs and the embedded default: `data_cache`, or one in the user's cache folder."""
    if config.data.data_cache is not None:
        return Path(config.data.data_cache)
    if named := os.environ.get("SIMPO_MEGATRON_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "simpo_megatron"


def hashes_file(config: Config) -> Path:
    """The file that keeps the hashes of weight files, in the cache folder."""
    return cache_folder(config) / "reference" / HASHES_FILE
