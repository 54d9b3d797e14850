"""A store whose bytes change, or that cannot be written: named, built anew, and never trained on."""

import errno
import os
import pickle

import pytest
from data_stores import build, folders, same, write_pairs

from simpo_megatron.data.store import pair_store as store_module
from simpo_megatron.data.store import store_seal
from simpo_megatron.errors import DataError

DAMAGES = {
    "zeros": lambda content: bytes(len(content)),
    "reversed": lambda content: content[::-1],
    "one bit": lambda content: content[:40] + bytes([content[40] ^ 4]) + content[41:],
    "cut": lambda content: content[:-4],
    "longer": lambda content: content + bytes(12),
    "empty": lambda content: b"",
    "gone": lambda content: None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["pairs.idx", "pairs.bin", "pairs.npy", "store.json"])
def test_a_damaged_store_is_named_and_built_anew_where_its_source_is(name, damage, tmp_path, caplog):
    path = write_pairs(tmp_path / "pairs.jsonl", 10)
    sound = build(path, tmp_path)
    [folder] = folders(tmp_path)
    content = damage((folder / name).read_bytes())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{folder}: found a damaged token store .*; delete the folder"):
        store_module.PairStore(folder)
    assert same(build(path, tmp_path), sound)
    assert f"{folder}: found a damaged token store" in caplog.text and folders(tmp_path) == [folder]


def test_a_damaged_store_that_cannot_be_removed_is_one_line(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "pairs.jsonl", 10)
    build(path, tmp_path)
    (folders(tmp_path)[0] / "pairs.bin").write_bytes(b"")
    monkeypatch.setattr(store_module, "remove_folder", lambda folder, inode: os.rename(folder, "/proc/none"))
    with pytest.raises(DataError, match="delete the folder, and the next run builds it anew$"):
        build(path, tmp_path)


def test_the_seal_looks_at_every_block_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store_seal, "_BLOCK_BYTES", 100)
    path = write_pairs(tmp_path / "pairs.jsonl", 10)
    build(path, tmp_path)
    [folder] = folders(tmp_path)
    content = (folder / "pairs.bin").read_bytes()
    for at in range(0, len(content), 50):
        (folder / "pairs.bin").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(DataError, match="the bytes of pairs.bin have changed"):
            store_module.PairStore(folder)
        store_module.PairStore(folder, verify=False)


@pytest.mark.parametrize("change", ["a bit turned", "cut short", "zeros"])
def test_bytes_that_change_while_a_store_is_in_use_are_never_trained_on(change, tmp_path):
    build(write_pairs(tmp_path / "pairs.jsonl", 10), tmp_path)
    [folder] = folders(tmp_path)
    store = store_module.PairStore(folder)
    first = 4 * int(store.lengths[0].sum())
    with (folder / "pairs.bin").open("r+b") as file:
        if change == "a bit turned":
            file.seek(first + 1)
            byte = file.read(1)
            file.seek(first + 1)
            file.write(bytes([byte[0] ^ 1]))
        elif change == "cut short":
            file.truncate(first + 2)
        else:
            file.seek(first)
            file.write(bytes(40))
    for used in [store] if change == "cut short" else [store, pickle.loads(pickle.dumps(store))]:
        assert len(used[0].prompt_ids) == store.lengths[0, 0]
        with pytest.raises(DataError, match=f"{folder}: found a damaged token store .*the bytes of pair 1 changed"):
            used[1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_one_line_with_the_option_that_helps(code, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store_module, "seal", fail)
    with pytest.raises(DataError, match=f"data_cache: .*{os.strerror(code)}.*--data-cache$"):
        build(write_pairs(tmp_path / "pairs.jsonl", 10), tmp_path)
    assert folders(tmp_path) == []
