"""The place of a model's weights: a folder or checkpoint of its own, or that of a base with adapters beside it.

All of it is found without torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simpo_megatron.checkpoint import manifest
from simpo_megatron.config.yaml_tree import read_yaml_tree
from simpo_megatron.convert.peft_files import base_model_of, is_peft_folder
from simpo_megatron.errors import CheckpointError, ConfigError
from simpo_megatron.mcore.hf import FILES_BESIDE_WEIGHTS, model_folder, read_hf_json

HASHES_FILE = "hashes.json"
"""The file that keeps the hashes of models' files."""
_MAX_ADAPTERS = 8
_RUN_CONFIG_FILE = "run_config.yaml"
_FORM_FILE, _FORM = "metadata.json", "torch_dist"
_MAX_POINTER_BYTES = 64


def has_tokenizer(folder: Path) -> bool:
    """True where a tokenizer lies in `folder`."""
    return (folder / "tokenizer_config.json").is_file()


@dataclass(frozen=True)
class ModelSource:
    """The place of a model."""

    base: Path
    """The folder of the weights: of Hugging Face's form, or a checkpoint."""
    adapters: tuple[Path, ...] = ()
    """Folders of what is added to the weights, in this order: of PEFT's form, or committed checkpoints of adapters."""
    hf_config: Path | None = None
    """The folder of config.json where `base` has none: a checkpoint of Megatron-LM or Megatron-Bridge."""

    @property
    def files(self) -> Path:
        """The folder of config.json."""
        return self.hf_config or self.base

    @property
    def tokenizer(self) -> Path:
        """The folder of tokenizer and chat template: the last that has them."""
        own = [folder for folder in self.adapters if has_tokenizer(folder)]
        return own[-1] if own else self.files

    @property
    def last(self) -> Path:
        """The folder that was named."""
        return self.adapters[-1] if self.adapters else self.base


def find_model(name: str | Path, hf_config: str | Path | None = None) -> ModelSource:
    """The model that `name` means: a folder or hub name of a model or of PEFT's adapters, a checkpoint, or a run.

    Adapters name their base model, which may have adapters of its own.

    Args:
        hf_config: folder or hub name of config.json and tokenizer, for a checkpoint that has none: Megatron-LM's.

    Raises:
        CheckpointError: a name is on neither the disk nor the hub, or adapters name each other as their bases.
        ConfigError: `hf_config` is missing, or there is no use for it.
    """
    adapters: list[Path] = []
    while True:
        path = model_folder(name)
        folder = manifest.resolve_checkpoint(path) or path
        base, of_base = base_of(folder), hf_config_of(folder)
        if base is None:
            return _own_weights(folder, tuple(reversed(adapters)), hf_config)
        adapters.append(folder)
        if len(adapters) > _MAX_ADAPTERS:
            raise CheckpointError(
                f"{adapters[0]}: found more than {_MAX_ADAPTERS} adapters on one another, expected a base model; merge "
                "some of them"
            )
        if not os.path.isdir(model_folder(base)):
            raise CheckpointError(
                f"{folder}: found adapters for the model {base!r}, which is not there, expected its folder or hub "
                "name; name it: --model BASE --adapter DIR"
            )
        name, hf_config = base, hf_config or of_base


def _own_weights(folder: Path, adapters: tuple[Path, ...], hf_config: str | Path | None) -> ModelSource:
    """The source of weights in `folder`, of a checkpoint of others with the folder that its config.json is in."""
    foreign = find_foreign(folder)
    if foreign is None:
        if hf_config is not None:
            raise ConfigError(
                f"hf_config: found {hf_config} with a model that has its own config.json, expected none; leave it out"
            )
        return ModelSource(folder, adapters)
    if hf_config is None:
        raise ConfigError(
            f"hf_config: found none with a checkpoint of Megatron-LM or Megatron-Bridge, {foreign}, expected the "
            "folder or hub name of its config.json and tokenizer; add --hf-config DIR"
        )
    return ModelSource(foreign, adapters, model_folder(hf_config, FILES_BESIDE_WEIGHTS))


def find_foreign(path: Path) -> Path | None:
    """The folder of the checkpoint that `path` means: itself, or that which Megatron's pointer in it names; None: none.

    A folder with a config.json or record of its own is none.

    Raises:
        CheckpointError: it is a checkpoint in another format than torch_dist, or of Megatron-Bridge's adapters.
        ConfigError: the configuration beside it is not such YAML.
    """
    if any((path / name).is_file() for name in ("config.json", manifest.RECORD_FILE)):
        return None
    pointer, folder = path / manifest.LATEST_FILE, path
    if pointer.is_file():
        said = pointer.read_bytes()[:_MAX_POINTER_BYTES].decode(errors="replace").strip()
        folder = path / (f"iter_{int(said):07d}" if said.isdecimal() else manifest.RELEASE)
    if not (folder / _FORM_FILE).is_file():
        if any(folder.glob("mp_rank_*")):
            raise CheckpointError(
                f"{folder}: found Megatron-LM's format torch, whose files are pickles, expected {_FORM}; save it again "
                f"there with --ckpt-convert-format {_FORM}"
            )
        return None
    form = read_hf_json(folder, _FORM_FILE).get("sharded_backend")
    if form != _FORM:
        raise CheckpointError(f"{folder / _FORM_FILE}: sharded_backend: found {form!r}, expected {_FORM!r}")
    _refuse_adapters_of_bridge(folder)
    return folder


def _refuse_adapters_of_bridge(folder: Path) -> None:
    """Return unless the checkpoint in `folder` is one of adapters alone, by the configuration that is kept with it.

    Source: Megatron-Bridge 0.6.2, training/checkpointing.py (apply_peft_adapter_filter_to_state_dict).
    """
    path = folder / _RUN_CONFIG_FILE
    _, root = read_yaml_tree(path) if path.is_file() else ("", None)
    sections = root.value if isinstance(root, yaml.MappingNode) else []
    if any(key.value == "peft" and isinstance(section, yaml.MappingNode) for key, section in sections):
        raise CheckpointError(
            f"{folder}: found adapters of Megatron-Bridge (peft in {_RUN_CONFIG_FILE}), expected them in PEFT's form; "
            "write them so by its AutoBridge.export_adapter_ckpt, and name that folder"
        )


def find_adapter(name: str | Path) -> Path:
    """The folder of adapters that `name` means: of PEFT's form, on the disk or the hub, a checkpoint, or a run.

    Raises:
        CheckpointError: there are no adapters.
    """
    path = model_folder(name)
    folder = manifest.resolve_checkpoint(path) or path
    if not is_peft_folder(folder) and _run_of_adapters(folder) is None:
        find_foreign(folder)
        raise CheckpointError(
            f"adapter: found no adapters in {folder}, expected a PEFT folder with adapter_config.json, or a run with "
            "adapters"
        )
    return folder


def base_of(folder: Path) -> str | None:
    """The name of the model that the adapters in `folder` belong to; None where it has none.

    Raises:
        CheckpointError: there are adapters, which name no model.
    """
    facts = _run_of_adapters(folder)
    if facts is not None:
        return str(facts.get("base") or facts.get("config", {}).get("model"))
    return base_model_of(folder) if is_peft_folder(folder) else None


def _run_of_adapters(folder: Path) -> Mapping[str, Any] | None:
    """The facts of the checkpoint in `folder` if it is one of adapters, else None."""
    if not (folder / manifest.RECORD_FILE).is_file():
        return None
    facts = manifest.read(folder).facts
    return None if facts.get("model", {}).get("lora_rank") is None else facts


def hf_config_of(folder: Path) -> str | None:
    """The folder of config.json of the model that the adapters in `folder` belong to, where it has none of its own."""
    if not (folder / manifest.RECORD_FILE).is_file():
        return None
    named = manifest.read(folder).facts.get("base_hf_config")
    return None if named is None else str(named)
