"""The embedded default is made whole, once, alike, and its pairs teach what they are meant to teach."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo_megatron.config import load_config
from simpo_megatron.demo import MAX_LENGTH, VOCAB_SIZE, DemoAssets, prepare_demo
from simpo_megatron.errors import DataError
from simpo_megatron.training.start.inputs import locate_sources
from tools.write_demo_pairs import write_pairs


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> DemoAssets:
    return prepare_demo(tmp_path_factory.mktemp("demo"))


def test_a_full_disk_is_one_kind_of_error_whatever_library_finds_it(tmp_path: Path, monkeypatch) -> None:
    def write(folder: Path, pairs: Path) -> None:
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library does

    monkeypatch.setattr("simpo_megatron.demo._write_tokenizer", write)
    config = load_config(["--data-cache", str(tmp_path / "cache")])
    with pytest.raises(DataError, match="data_cache: found .*could not be written .No space left.*--data-cache"):
        locate_sources(config)
    assert not list(tmp_path.rglob("*llama*"))


@pytest.mark.processes
def test_processes_that_start_at_the_same_moment_leave_one_whole_folder(assets: DemoAssets, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    code = f"from simpo_megatron.demo import *; prepare_demo({str(folder)!r})"
    running = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    assert os.listdir(folder) == ["tiny-llama"]
    assert digests(prepare_demo(folder).model_dir) == digests(assets.model_dir)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_second_call_changes_nothing_and_another_folder_gets_the_same_bytes(
    assets: DemoAssets, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in assets.model_dir.iterdir()}
    torch.manual_seed(17)
    state = torch.get_rng_state()
    assert prepare_demo(assets.model_dir.parent) == assets
    again = prepare_demo(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in assets.model_dir.iterdir()} == before
    assert digests(again.model_dir) == digests(assets.model_dir)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_committed_pairs_are_those_the_generator_writes(assets: DemoAssets, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    for path in (assets.train_file, assets.valid_file):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_validation_pairs_ask_what_no_training_pair_asks(assets: DemoAssets) -> None:
    def prompts(path: Path) -> set[str]:
        return {pair["prompt"][0]["content"] for pair in records(path)}

    def answers(path: Path) -> set[str]:
        return {pair["chosen"][0]["content"] for pair in records(path)}

    assert not prompts(assets.train_file) & prompts(assets.valid_file)
    assert not answers(assets.train_file) & answers(assets.valid_file)
    assert len(records(assets.train_file)) == 384 and len(records(assets.valid_file)) == 96


def test_the_length_of_an_answer_does_not_tell_which_was_chosen(assets: DemoAssets) -> None:
    pairs = records(assets.train_file) + records(assets.valid_file)
    lengths = [[len(pair[side][0]["content"].split()) for side in ("chosen", "rejected")] for pair in pairs]
    longer = sum(chosen > rejected for chosen, rejected in lengths) / len(lengths)
    shorter = sum(chosen < rejected for chosen, rejected in lengths) / len(lengths)
    assert 0.4 < longer < 0.6 and 0.4 < shorter < 0.6
    mean_chosen, mean_rejected = torch.tensor(lengths, dtype=torch.float64).mean(0)
    assert abs(mean_chosen / mean_rejected - 1) < 0.05


def test_the_tokenizer_fits_the_model_and_its_template_extends_the_prompt(assets: DemoAssets) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir)
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir)
    assert len(tokenizer) == model.config.vocab_size == VOCAB_SIZE
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        model.config.pad_token_id,
        model.config.bos_token_id,
        model.config.eos_token_id,
    )
    for pair in records(assets.train_file) + records(assets.valid_file):
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
            assert whole[: len(prompt)] == prompt and whole[-1] == tokenizer.eos_token_id
            assert whole.count(tokenizer.bos_token_id) == 1 and len(whole) <= MAX_LENGTH
            assert tokenizer.decode(whole[len(prompt) : -1]) == pair[side][0]["content"]


def test_any_text_survives_the_tokenizer(assets: DemoAssets) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir)
    text = "Zażółć gęślą jaźń, 你好 \U0001f600\t  two  spaces\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
