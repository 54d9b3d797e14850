"""A model named as on the hub is the snapshot in its download cache; what is a path stays one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planning_cases import HF_CONFIG

from simpo_megatron.commands import plan as plan_command
from simpo_megatron.config import config_from
from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore.hub import hub_name, model_folder
from simpo_megatron.training.inputs import locate_sources

NEWEST, EARLIER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """A download cache as huggingface_hub makes it, links to blobs and all, with two revisions of owner/model."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--model"
    for commit, names in ((NEWEST, ("main",)), (EARLIER, ("v1",))):
        blob, snapshot = repository / "blobs" / f"blob-{commit[0]}", repository / "snapshots" / commit
        for folder in (blob.parent, snapshot, repository / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_text(json.dumps(HF_CONFIG))
        (snapshot / "config.json").symlink_to(f"../../blobs/{blob.name}")
        for name in names:
            (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize(
    ("name", "commit"), [("owner/model", NEWEST), ("owner/model@v1", EARLIER), (f"owner/model@{EARLIER}", EARLIER)]
)
def test_a_name_is_the_snapshot_of_its_revision(cache: Path, name: str, commit: str, capsys) -> None:
    folder = cache / "models--owner--model" / "snapshots" / commit
    assert model_folder(name) == folder
    assert locate_sources(config_from(model=name, data=("pairs.jsonl",))).model == folder
    assert plan_command.main(["--model", name, "--gpus", "8"]) == 0
    assert "llama: 4 layers, hidden 256" in capsys.readouterr().out
    assert hub_name(name) == hub_name(str(folder)) == "owner/model"


def test_a_folder_and_what_lies_in_one_is_no_name(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for path in ("runs/not-there", "model", "./owner/model", "/owner/model", "owner/model/deeper"):
        assert model_folder(path) == Path(path) and hub_name(path) is None


@pytest.mark.parametrize("name", ["owner/other", "owner/model@v9"])
def test_what_the_cache_does_not_have_is_refused_in_one_line(cache: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"model: found '{name}', expected a folder, or the name") as refused:
        model_folder(name)
    assert "\n" not in str(refused.value)
