"""Every key that Megatron-Bridge can write is known to its table: a new one is seen the day its version is there.

`make test-nemo` fetches wheels, which are read as text, into folders of the one that SIMPO_BRIDGE_WHEELS names.
"""

from __future__ import annotations

import os
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from dataclass_sources import Sources
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from simpo_megatron.nemo.bridge import BRIDGE

FETCHED = os.environ.get("SIMPO_BRIDGE_WHEELS")
FOLDERS = sorted(Path(FETCHED).iterdir()) if FETCHED and Path(FETCHED).is_dir() else []
# Models and data of other kinds, whose keys have no meaning for a language model that learns from pairs.
OTHERS = {
    *("T5ModelProvider", "HybridModelProvider", "HybridModelConfig", "MambaModelProvider", "MegatronMIMOProvider"),
    *("MegatronMIMOConfig", "MambaModelConfig", "EnergonDatasetConfig", "MockVLMSFTDatasetConfig", "DatasetProvider"),
    *("GPTFIMDatasetConfig", "MockGPTDatasetConfig"),
}
# Fields of a type that a recipe fills with one of its kinds.
KINDS = {"peft": [("megatron.bridge.peft.lora", "LoRA")]}
CONFIG = "megatron.bridge.training.config"


def is_known(key: str) -> bool:
    return any(fnmatchcase(key, known) for known in BRIDGE.table)


def test_every_setting_of_megatron_core_is_known():
    sections = {"model.": TransformerConfig, "optimizer.": OptimizerConfig, "ddp.": DistributedDataParallelConfig}
    names = [prefix + field.name for prefix, section in sections.items() for field in fields(section)]
    assert len(names) > 200
    assert [name for name in names if not is_known(name)] == []


@pytest.mark.skipif(not FOLDERS, reason="SIMPO_BRIDGE_WHEELS names no folder of Megatron-Bridge's wheels")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_setting_of_megatron_bridge_is_known(folder):
    sources = Sources(sorted(folder.glob("*.whl")))
    container = sources.annotations(CONFIG, "ConfigContainer")
    assert {"train", "model", "optimizer", "scheduler", "checkpoint"} <= container.keys()
    names = [section for section in container if not any(key.startswith(f"{section}.") for key in BRIDGE.table)]
    for section, types in container.items():
        kinds = [(CONFIG, name) for name in types if name not in OTHERS] + KINDS.get(section, [])
        names += [f"{section}.{field}" for module, name in kinds for field in sources.annotations(module, name)]
    assert len(names) > 400
    unknown = sorted(name for name in set(names) if not is_known(name))
    assert not unknown, "not in simpo_megatron/nemo/bridge.py: " + " ".join(unknown)
