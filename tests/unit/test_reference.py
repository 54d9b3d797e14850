"""The cache of the initial model's log-probs: its key by weights, and refused files."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from simpo_megatron.checkpoint import fingerprint
from simpo_megatron.checkpoint.fingerprint import model_fingerprint, sampled_fingerprint
from simpo_megatron.errors import DataError
from simpo_megatron.training.reference import _read, _write


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.manual_seed(0)
    save_file({"w": torch.randn(3000, 2000)}, tmp_path / "model.safetensors")  # 24 MB, more than is sampled
    return tmp_path


def test_the_same_weights_elsewhere_and_later_are_the_same_model(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text("not the model")
    assert model_fingerprint(other, other / "h.json") == model_fingerprint(folder, other / "h.json")
    assert sampled_fingerprint(other) == sampled_fingerprint(folder)


def test_one_other_weight_and_another_config_are_other_models(folder, tmp_path_factory):
    memory = tmp_path_factory.mktemp("memory") / "hashes.json"
    before = model_fingerprint(folder, memory)
    (folder / "config.json").write_text('{"rope_theta": 1}')
    config = model_fingerprint(folder, memory)
    path = folder / "model.safetensors"
    times = path.stat()
    with path.open("r+b") as file:  # in place, a byte between those that were sampled once, and the time set back
        file.seek(path.stat().st_size // 2 + 50_000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len({before, config, model_fingerprint(folder, memory)}) == 3


def test_a_file_that_has_not_changed_is_not_read_again(folder, tmp_path_factory, monkeypatch):
    memory = tmp_path_factory.mktemp("memory") / "hashes.json"
    first = model_fingerprint(folder, memory)
    monkeypatch.setattr(fingerprint.manifest, "digest_file", None)
    assert model_fingerprint(folder, memory) == first
    memory.write_text("[1]")
    monkeypatch.undo()
    assert model_fingerprint(folder, memory) == first
    assert model_fingerprint(folder, folder / "config.json" / "no folder") == first


def test_what_was_written_is_read_and_nothing_else_is_there(tmp_path):
    averages = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    path = tmp_path / "reference" / "a.npy"
    assert _read(path, 5) is None
    _write(path, averages)
    assert np.array_equal(_read(path, 5), averages)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("spoil", ["short", "another size", "not a number"])
def test_a_cache_that_is_not_of_these_pairs_is_refused_with_its_name(tmp_path, spoil):
    path = tmp_path / "a.npy"
    averages = np.zeros((5, 2), np.float32)
    if spoil == "not a number":
        averages[3, 1] = np.nan
    _write(path, averages)
    if spoil == "short":
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"a\.npy: .*delete it to compute it again"):
        _read(path, 6 if spoil == "another size" else 5)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "reference").write_text("a file")
    with pytest.raises(DataError, match="data_cache: found .*a.npy, which cannot be written"):
        _write(tmp_path / "reference" / "a.npy", np.zeros((1, 2), np.float32))
