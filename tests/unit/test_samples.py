"""Samples of a model's files tell two models apart, whichever tensor differs."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from simpo_megatron.convert import samples
from simpo_megatron.convert.samples import sampled_digests


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{number}": torch.randn(300, 40, generator=generator) for number in range(20)}
    save_file({**tensors, "norm": torch.ones(64)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def changed(folder, change):
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    change(copy)
    return [name for name, digest in sampled_digests(copy).items() if sampled_digests(folder).get(name) != digest]


def test_a_copy_has_the_same_digests(folder):
    assert changed(folder, lambda copy: None) == []
    assert set(sampled_digests(folder)) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["layer0", "layer19", "norm"])
def test_a_tensor_that_training_moved_is_seen(folder, name):
    from safetensors.torch import load_file

    def move(copy):
        tensors = load_file(copy / "model.safetensors")
        save_file({**tensors, name: tensors[name] + 1e-3}, copy / "model.safetensors")

    assert changed(folder, move) == ["model.safetensors"]


def test_a_configuration_a_longer_file_and_a_file_more_are_seen(folder):
    assert changed(folder, lambda copy: (copy / "config.json").write_text("{ }")) == ["config.json"]
    shutil.rmtree(folder.with_name("copy"))
    assert changed(folder, lambda copy: (copy / "extra.safetensors").write_bytes(b"0" * 9)) == ["extra.safetensors"]


def test_what_is_no_safetensors_file_is_sampled_at_even_distances(folder):
    for content in (b"", b"\xff" * 100, b"\x05\0\0\0\0\0\0\0{1234}" + bytes(5000)):
        (folder / "model.safetensors").write_bytes(content)
        assert len(sampled_digests(folder)["model.safetensors"]) == 16


def test_the_number_of_reads_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(samples, "_MAX_SAMPLES", 48)
    reads = []
    pread = samples.os.pread
    monkeypatch.setattr(samples.os, "pread", lambda *arguments: reads.append(arguments) or pread(*arguments))
    sampled_digests(folder)
    assert 16 < len(reads) < 52
