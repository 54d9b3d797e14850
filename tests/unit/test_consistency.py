"""The checksum of a weight sees one changed bit wherever it is, and what is not finite is found without a copy."""

from __future__ import annotations

import os

import pytest
import torch

from simpo_megatron.config import Config
from simpo_megatron.errors import CheckpointError, NumericsError
from simpo_megatron.training.peers.consistency import (
    _not_finite,
    _ranks_by_value,
    _sum_of_bits,
    _text,
    startup_facts,
    unchanged_model,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [1, 3, 64, 65])
@pytest.mark.parametrize("start", [0, 1])
def test_every_bit_counts(dtype, num, start):
    weight = torch.randn(num + start, generator=torch.Generator().manual_seed(0)).to(dtype)[start:]
    before = int(_sum_of_bits(weight))
    assert int(_sum_of_bits(weight.clone())) == before
    integers = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    for index in range(num):
        integers[index] ^= 1
        assert int(_sum_of_bits(weight)) != before
        integers[index] ^= 1
    assert int(_sum_of_bits(weight)) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [0, 5, 9])
def test_a_weight_that_is_not_finite_is_named(value, index):
    weights = {"first": torch.ones(3), "second": torch.arange(10.0)}
    assert _not_finite(weights) is None
    weights["second"][index] = value
    error = _not_finite(weights)
    assert isinstance(error, NumericsError) and "weights: found 1 that are not finite, second first" in str(error)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "new.safetensors"])
def test_a_model_that_changes_while_it_is_read_is_refused(name, world_of_one, tmp_path):
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / file).write_text("before")
    with unchanged_model([tmp_path]):
        (tmp_path / "tokenizer.json").write_text("its ids are compared with those of the pairs")
    with (
        pytest.raises(CheckpointError, match=f"model: found {name} of {tmp_path} changed"),
        unchanged_model([tmp_path]),
    ):
        os.utime(tmp_path / "config.json", ns=(1, 1)) if name == "config.json" else (tmp_path / name).write_text("!")


def test_the_rarest_value_comes_first_with_its_ranks():
    said = _ranks_by_value(["42", "42", "43", "42"])
    assert said == "43 on rank 2, 42 on ranks 0, 1, 3"


def test_one_character_of_the_code_is_another_fact(tmp_path, monkeypatch):
    (tmp_path / "loss").mkdir()
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "loss" / "simpo.py").write_text("beta = 2.0\n")
    monkeypatch.setattr("simpo_megatron.__file__", str(tmp_path / "__init__.py"))
    before = startup_facts(Config())["simpo_megatron"]
    assert startup_facts(Config())["simpo_megatron"] == before
    (tmp_path / "loss" / "simpo.py").write_text("beta = 2.5\n")
    assert startup_facts(Config())["simpo_megatron"] != before


def test_a_function_is_the_same_fact_in_every_process():
    assert _text(torch.nn.functional.silu) == "silu"
    assert _text(True) == "True" and _text(None) == "None"
