"""The lock on a run's folder follows no link: what a link of its name leads to stays as it is."""

import pytest

from simpo_megatron.checkpoint.run_lock import lock
from simpo_megatron.errors import CheckpointError


@pytest.mark.parametrize("name", [".lock", ".holder"])
def test_a_folder_in_place_of_a_file_of_the_lock_is_named(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"save: found {tmp_path}.*, which cannot be written"):
        lock(tmp_path)
    (tmp_path / name).rmdir()
    lock(tmp_path).release()


@pytest.mark.parametrize("name", [".lock", ".holder"])
def test_a_link_in_place_of_a_file_of_the_lock_changes_nothing_elsewhere(name, tmp_path):
    precious, save = tmp_path / "precious", tmp_path / "run"
    precious.write_text("kept")
    save.mkdir()
    (save / name).symlink_to(precious)
    if name == ".lock":
        with pytest.raises(CheckpointError, match=f"save: found {save}, which cannot be written .*symbolic links"):
            lock(save)
    else:
        lock(save).release()
    assert precious.read_text() == "kept"
