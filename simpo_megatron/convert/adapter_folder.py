"""Reads PEFT folders: the layers that have adapters, and the tensors by PEFT's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from simpo_megatron.config.lora_section import LORA_PARTS, LORA_TARGETS, OF_LATENT_ATTENTION, LoRAConfig
from simpo_megatron.convert.adapter import adapter_tensors
from simpo_megatron.convert.mapping import rules_of_layers
from simpo_megatron.convert.peft_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from simpo_megatron.convert.stored_tensors import open_safetensors
from simpo_megatron.convert.weight_rules import Rule
from simpo_megatron.errors import CheckpointError, ConfigError, listed
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.hf import own_file, read_hf_json

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_NOTHING: tuple[Any, ...] = (None, False, "none", "", [], {})
# Keys of adapter_config.json that do not change B A: how adapters were made, and notes.
_OF_TRAINING = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
# Other initialisations change the base model's weights, and do so again when PEFT loads the folder.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


_Test = Callable[[tuple[str, ...]], bool]


class AdapterTensors(Protocol):
    """Trained adapters whose tensors can be had one by one."""

    folder: Path
    settings: LoRAConfig
    names: Collection[str]
    """All tensors by PEFT's names."""
    base_dtype: torch.dtype | None
    """The dtype that the weights beside them had in training; None where nothing tells."""

    def read(self, name: str) -> Tensor:
        """The tensor that PEFT calls `name`, on the CPU, as it is stored."""
        ...


class PeftFolder:
    """adapter_config.json and adapter_model.safetensors, both checked to be what `mcore.lora` computes."""

    base_dtype: torch.dtype | None = None

    def __init__(self, folder: Path, description: ModelDescription) -> None:
        """Adapters for a model of `description`.

        Raises:
            CheckpointError: a file is missing or damaged, or holds tensors that are no adapters of such a model.
            ConfigError: the kind of adapters is not supported; the key is named.
        """
        self.folder = folder
        config = read_hf_json(folder, CONFIG_FILE)
        _refuse_other_kinds(config, folder / CONFIG_FILE)
        self._file = _weights_file(folder)
        with open_safetensors(self._file) as file:
            self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
        targets = _targets(self._modules(), description, folder, self._share_an_A)
        try:
            self.settings = LoRAConfig(
                lora_rank=config.get("r"),
                lora_alpha=float(config["lora_alpha"]),
                use_rslora=bool(config.get("use_rslora")),
                lora_targets=targets,
            )
        except (ConfigError, TypeError, ValueError, LookupError) as error:
            raise ConfigError(f"{folder / CONFIG_FILE}: {error}") from None
        expected = adapter_tensors(description, self.settings)
        _refuse_other_shapes(self._shapes, expected, folder)
        self.names: Collection[str] = expected

    def read(self, name: str) -> Tensor:
        with open_safetensors(self._file) as file:
            return file.get_tensor(name)

    def _modules(self) -> set[str]:
        """The modules with adapters, without PEFT's prefix; the shapes are kept under whole names."""
        found = set()
        for name in self._shapes:
            named = _TENSOR.fullmatch(name)
            if named is None or not name.startswith(PREFIX):
                raise CheckpointError(
                    f"{self._file}: found tensor {name}, expected {PREFIX}MODULE.lora_A.weight and .lora_B.weight alone"
                )
            found.add(named["module"].removeprefix(PREFIX))
        return found

    def _share_an_A(self, modules: tuple[str, ...]) -> bool:
        first, *others = (self.read(f"{PREFIX}{module}.lora_A.weight") for module in modules)
        return all(torch.equal(first, other) for other in others)


def _refuse_other_kinds(config: Mapping[str, Any], where: Path) -> None:
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ConfigError(f"{where}: peft_type: found {kind!r}, expected 'LORA', the one kind of adapter here")
    if start not in _PLAIN_STARTS:
        raise ConfigError(
            f"{where}: init_lora_weights: found {start!r}, which changes the base model too, expected one of "
            f"{', '.join(map(str, _PLAIN_STARTS))}; convert the adapter with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...)"
        )
    for key, value in config.items():
        if key not in _OF_TRAINING and value not in _NOTHING:
            raise ConfigError(
                f"{where}: {key}: found {str(value)[:60]}, expected none; such adapters are not computed here, merge "
                "them with PEFT's merge_and_unload first"
            )


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; pickled adapters (adapter_model.bin) are never read, save them as safetensors" if pickled else ""
        raise CheckpointError(f"{path}: found no such file, expected the adapters' weights{hint}")
    return own_file(folder, WEIGHTS_FILE)


def _targets(modules: set[str], description: ModelDescription, folder: Path, share_an_A: _Test) -> tuple[str, ...]:
    """The targets by megatron's names, the same in every layer.

    Raises:
        CheckpointError: adapters are on other modules than these layers, or on those of some layers alone.
    """
    of_layers: dict[int, dict[str, tuple[str, ...]]] = {}
    known: set[str] = set()
    for rule, layer, target in _adaptable(description):
        names = tuple(name.format(layer).removesuffix(".weight") for name in rule.hf_names)
        known |= set(names)
        of_layers.setdefault(layer, {})[target] = names
    _require_whole_latents(of_layers, modules, folder)
    if others := sorted(modules - known):
        raise CheckpointError(
            f"{folder}: found adapters on {listed(others, 3)}, expected the attention and MLP layers alone, and no "
            "experts; merge them with PEFT's merge_and_unload first"
        )
    found = [_targets_of(names, modules, share_an_A) for names in of_layers.values()]
    if not found or not found[0]:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: found no adapters, expected some")
    differing = next((layer for layer, targets in enumerate(found) if targets != found[0]), None)
    if differing is not None:
        raise CheckpointError(
            f"{folder}: found adapters on {' '.join(found[differing]) or 'nothing'} in layer {differing} and on "
            f"{' '.join(found[0])} in layer 0, expected the same in every layer; merge them with PEFT's "
            "merge_and_unload first"
        )
    return found[0]


def _require_whole_latents(
    of_layers: Mapping[int, Mapping[str, tuple[str, ...]]], modules: set[str], folder: Path
) -> None:
    """Return if either all or none of the matrices of latent attention have adapters."""
    for targets in of_layers.values():
        latent = {name for target, names in targets.items() if target in OF_LATENT_ATTENTION for name in names}
        if latent & modules and not latent <= modules:
            raise CheckpointError(
                f"{folder}: found no adapters on {listed(sorted(latent - modules), 3)}, expected some on all layers of "
                "latent attention or on none; merge them with PEFT's merge_and_unload first"
            )


def _adaptable(description: ModelDescription) -> Iterator[tuple[Rule, int, str]]:
    """(rule of a weight, layer, target) of each linear layer that can have an adapter."""
    for rule, layer in rules_of_layers(description):
        owner, _, target = rule.parameter.removesuffix(".weight").rpartition(".")
        if target in (*LORA_TARGETS, *OF_LATENT_ATTENTION) and owner in ("self_attention", "mlp"):
            yield rule, layer, target


def _targets_of(
    names_of_targets: Mapping[str, tuple[str, ...]], modules: set[str], share_an_A: _Test
) -> tuple[str, ...]:
    """The targets of one layer, given the modules that make up each."""
    latent = [names for target, names in names_of_targets.items() if target in OF_LATENT_ATTENTION]
    found = ["linear_qkv"] if latent and all(set(names) <= modules for names in latent) else []
    for target, names in names_of_targets.items():
        if target in OF_LATENT_ATTENTION:
            continue
        adapted = [number for number, name in enumerate(names) if name in modules]
        is_one = len(set(names)) == 1
        if adapted and (is_one or (len(adapted) == len(names) and share_an_A(names))):
            found.append(target)
        else:
            found += [LORA_PARTS[target][number] for number in adapted]
    return tuple(found)


def _refuse_other_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: found adapters of another model or rank, expected this one's: {listed(problems, 3, '; ')}"
        )
