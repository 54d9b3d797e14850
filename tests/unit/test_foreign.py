"""Checkpoints of Megatron-LM and Megatron-Bridge are found by their files, and what cannot be read is refused by name.

That their weights are those of the model is tests/distributed/test_offline_convert.py's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpo_megatron.checkpoint.model_source import find_adapter, find_foreign, find_model
from simpo_megatron.errors import CheckpointError, ConfigError


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """The files by which a checkpoint is known."""
    folder = tmp_path / "theirs" / "iter_0000012"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("12\n")
    return folder


def test_the_pointer_or_the_folder_itself_is_named(theirs: Path) -> None:
    assert find_foreign(theirs) == find_foreign(theirs.parent) == theirs
    theirs.rename(theirs.with_name("release"))
    (theirs.parent / "latest_checkpointed_iteration.txt").write_text("release")
    assert find_foreign(theirs.parent) == theirs.with_name("release")


def test_config_and_tokenizer_come_from_the_folder_that_is_named(theirs: Path, tmp_path: Path) -> None:
    source = find_model(theirs.parent, tmp_path / "hf")
    assert (source.base, source.files, source.tokenizer) == (theirs, tmp_path / "hf", tmp_path / "hf")
    with pytest.raises(ConfigError, match="hf_config: found none with a checkpoint of Megatron-LM or Megatron-Bridge"):
        find_model(theirs)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="hf_config: found other with a model that has its own config.json"):
        find_model(model, "other")


@pytest.mark.parametrize("form", ["fsdp_dtensor", "zarr", None])
def test_another_format_is_refused_by_its_name(theirs: Path, form: str | None) -> None:
    (theirs / "metadata.json").write_text(json.dumps({"sharded_backend": form}))
    with pytest.raises(CheckpointError, match=f"sharded_backend: found {form!r}, expected 'torch_dist'"):
        find_foreign(theirs)


def test_adapters_of_megatron_bridge_are_refused_by_name_with_the_way_to_peft(theirs: Path, tmp_path: Path) -> None:
    config = theirs / "run_config.yaml"
    config.write_text("model: {hf_model_id: a/b}\npeft: null\n")
    assert find_foreign(theirs) == theirs
    config.write_text("model: {}\npeft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  dim: 8\n")
    for find in (lambda: find_model(theirs.parent, tmp_path), lambda: find_adapter(theirs.parent)):
        with pytest.raises(CheckpointError, match="adapters of Megatron-Bridge .*AutoBridge.export_adapter_ckpt"):
            find()


def test_the_pickles_of_the_legacy_format_are_refused(theirs: Path) -> None:
    (theirs / "metadata.json").unlink()
    (theirs / "mp_rank_00").mkdir()
    with pytest.raises(CheckpointError, match="found Megatron-LM's format torch, whose files are pickles"):
        find_foreign(theirs.parent)


@pytest.mark.parametrize("said", ["../../etc", "12 34", "\x1b[31m", ""])
def test_a_pointer_leads_nowhere_else(theirs: Path, said: str) -> None:
    (theirs.parent / "latest_checkpointed_iteration.txt").write_text(said)
    assert find_foreign(theirs.parent) is None
