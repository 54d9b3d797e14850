"""Exports to a folder: what may be replaced, what is set aside, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo_megatron.convert import refuse_existing_export
from simpo_megatron.convert.folder import MARKER_FILE, mark, new_output, origin_of
from simpo_megatron.errors import CheckpointError


def test_an_export_folder_with_content_is_refused_beforehand(tmp_path: Path) -> None:
    refuse_existing_export(tmp_path / "new")
    refuse_existing_export(tmp_path)
    (tmp_path / "kept").write_text("")
    with pytest.raises(CheckpointError, match="that simpo_megatron did not write"):
        refuse_existing_export(tmp_path)


def export(folder: Path, origin: str | None, content: str) -> None:
    refuse_existing_export(folder)
    with new_output(folder, origin) as draft:
        (draft / "content").write_text(content)
        mark(draft)


def test_an_export_of_another_run_is_set_aside_and_one_of_the_same_run_replaced(tmp_path: Path, caplog) -> None:
    out = tmp_path / "out"
    for origin, content, num_aside in (
        ("a", "1", 0), ("a", "2", 0), ("b", "3", 1), (None, "4", 2), (None, "5", 3), ("b", "6", 4), ("b", "7", 4)
    ):  # fmt: skip
        caplog.clear()
        aside = set(tmp_path.glob("out.aside-*"))
        before = (out / "content").read_text() if out.exists() else None
        export(out, origin, content)
        assert (out / "content").read_text() == content
        new = set(tmp_path.glob("out.aside-*")) - aside
        assert len(aside | new) == num_aside
        assert [(folder / "content").read_text() for folder in new] == [before] * len(new)
        assert ("moved aside to" in caplog.text) == bool(new)


def test_an_export_that_fails_leaves_the_one_before_where_it_was(tmp_path: Path) -> None:
    export(tmp_path / "out", "a", "1")
    with pytest.raises(RuntimeError), new_output(tmp_path / "out", "b"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_model_that_an_export_is_made_of_is_never_replaced(tmp_path: Path) -> None:
    export(tmp_path / "model", "a", "1")
    (tmp_path / "link").symlink_to("model")
    for out in (tmp_path / "model", tmp_path / "link", tmp_path, tmp_path / "model" / ".." / "model"):
        with pytest.raises(CheckpointError, match="found the model that the export is made of"):
            refuse_existing_export(out, tmp_path / "model")
    refuse_existing_export(tmp_path / "other", tmp_path / "model")


def test_a_run_is_the_origin_of_all_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "COMMIT.json").touch()
    assert origin_of(tmp_path / "iter_0000001") == origin_of(tmp_path) == str(tmp_path.resolve())


def test_an_earlier_export_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / MARKER_FILE).write_text("{}")
    refuse_existing_export(tmp_path)
