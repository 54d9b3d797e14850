"""Averages are what float64 says, comparisons see a single bit, and what cannot be averaged is refused by name."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from data_tokenizers import llama_like, qwen_like
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from simpo_megatron.config import config_from
from simpo_megatron.convert.folder import new_output
from simpo_megatron.demo import prepare_demo
from simpo_megatron.errors import CheckpointError, NumericsError
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.parallel import alone
from tools import convert_hf, merge_checkpoints, verify_checkpoint

cpu_patches.install()

from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy  # noqa: E402

from simpo_megatron.checkpoint import manifest  # noqa: E402
from simpo_megatron.checkpoint.initial_weights import fill_weights  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402
from simpo_megatron.offline import convert as offline_convert  # noqa: E402
from simpo_megatron.offline.convert import _card, to_hf, to_mcore  # noqa: E402
from simpo_megatron.offline.weights import MegatronWeights, open_weights  # noqa: E402

TINY = {
    "vocab_size": 1003,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def write_model(folder: Path, seed: int, dtype=torch.bfloat16, tokenizer=None, **changes) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).to(dtype).save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b", "c")):
        write_model(folder / name, seed, tokenizer=llama_like(), dtype=torch.float32 if name == "c" else torch.bfloat16)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def merge(*arguments: object) -> int:
    return merge_checkpoints.main(list(map(str, arguments)))


def test_an_average_is_the_fp64_one_rounded_once(models, tmp_path):
    out = tmp_path / "out"
    assert merge(out, models / "a", models / "b", models / "c", "--shares", 3, 1, -0.5) == 0
    found, *sources = map(weights, (out, models / "a", models / "b", models / "c"))
    changed = 0
    for name, tensor in found.items():
        exact = sum(share * source[name].double() for share, source in zip((3, 1, -0.5), sources, strict=True)) / 3.5
        assert tensor.dtype == torch.bfloat16
        # Half a unit in the last place of bf16, and what fp32 sums add.
        assert ((tensor.double() - exact).abs() <= exact.abs() * 2**-7.99 + 1e-8).all(), name
        changed += not torch.equal(tensor, sources[0][name])
    assert changed > 10
    assert (out / "tokenizer.json").read_bytes() == (models / "a" / "tokenizer.json").read_bytes()
    assert "0.857143 x `a`" in (out / "README.md").read_text()


def test_the_average_of_a_model_with_itself_is_itself(models, tmp_path):
    assert merge(tmp_path / "out", models / "a", models / "a") == 0
    assert all(torch.equal(tensor, weights(models / "a")[name]) for name, tensor in weights(tmp_path / "out").items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "layernorm_epsilon is 1e-06 and 1e-05"),
        ({"num_hidden_layers": 3}, "num_layers is 2 and 3"),
        ({"vocab_size": 1100}, "vocab_size is 1003 and 1100"),
        ({"tokenizer": qwen_like()}, "tokenizers differ in"),
        ({"tokenizer": None}, "only one has a tokenizer"),
    ],
)
def test_models_that_are_not_one_are_refused(models, tmp_path, capsys, changes, said):
    other = write_model(tmp_path / "other", 7, **{"tokenizer": llama_like(), **changes})
    assert merge(tmp_path / "out", models / "a", other) == 4
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_chat_template_is_refused(models, tmp_path, capsys):
    tokenizer = copy.deepcopy(llama_like())
    tokenizer.chat_template += " "
    other = write_model(tmp_path / "other", 7, tokenizer=tokenizer)
    assert merge(tmp_path / "out", models / "a", other) == 4
    assert "tokenizers differ in chat_template" in capsys.readouterr().err


@pytest.mark.parametrize("shares", [(1,), (1, -1), (float("nan"), 1), (float("inf"), 1)])
def test_shares_that_make_no_average_are_refused(models, tmp_path, capsys, shares):
    assert merge(tmp_path / "out", models / "a", models / "b", "--shares", *shares) == 2
    assert "shares: found" in capsys.readouterr().err


def flip_a_bit(folder: Path) -> str:
    """The name of the tensor of bf16 that has another lowest bit in one place now."""
    changed, name = weights(folder), "model.layers.1.mlp.up_proj.weight"
    changed[name].view(torch.int16)[5, 7] ^= 1
    save_file(changed, folder / "model.safetensors")
    return name


def test_a_single_bit_is_seen_and_named(models, tmp_path, capsys):
    assert verify_checkpoint.main([str(models / "a"), str(models / "a")]) == 0
    assert "equal in every byte" in capsys.readouterr().out
    copy = tmp_path / "copy"
    shutil.copytree(models / "a", copy)
    name = flip_a_bit(copy)
    assert verify_checkpoint.main([str(models / "a"), str(copy)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line]
    assert name in line and "at most" in line


def test_what_two_dtypes_store_is_compared_in_the_narrower_and_said_to_be(models, tmp_path, capsys):
    copy, pairs = tmp_path / "copy", prepare_demo(tmp_path / "demo").valid_file
    shutil.copytree(models / "c", copy)
    save_file({name: tensor.bfloat16() for name, tensor in weights(copy).items()}, copy / "model.safetensors")
    for sides in ((models / "c", copy), (copy, models / "c")):
        assert verify_checkpoint.main([*map(str, sides), "--pairs", str(pairs), "--max-pairs", "2"]) == 0
        out = capsys.readouterr().out
        assert "equal as bfloat16" in out and "DIFFERS" not in out and "float32 [32]" in out
        assert "21 of 21 tensors are equal in every byte; 21 are stored in two dtypes, and were compared once" in out
        assert "of both models rounded to bfloat16" in out
    name = flip_a_bit(copy)
    assert verify_checkpoint.main([str(models / "c"), str(copy)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line]
    assert name in line and "DIFFERS as bfloat16 by" in line


def test_two_formats_of_as_many_bits_are_compared_in_that_of_the_second(models, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(models / "a", copy)
    save_file({name: tensor.half() for name, tensor in weights(copy).items()}, copy / "model.safetensors")
    assert verify_checkpoint.main([str(models / "a"), str(copy)]) == 0
    assert "equal as float16" in capsys.readouterr().out


def test_log_probs_of_both_sides_are_printed_and_judged(models, tmp_path, capsys):
    pairs = prepare_demo(tmp_path / "demo").valid_file
    arguments = ["--pairs", str(pairs), "--max-pairs", "2"]
    assert verify_checkpoint.main([str(models / "a"), str(models / "b"), *arguments]) == 1
    out = capsys.readouterr().out
    assert "largest difference of 4 average log-probs" in out and "average log-prob of a token" in out


def test_two_writers_of_one_output_do_not_meet(tmp_path):
    with new_output(tmp_path / "out") as staging:
        (staging / "file").write_text("first")
        with pytest.raises(CheckpointError, match="found another process writing it"), new_output(tmp_path / "out"):
            pass
        assert (staging / "file").exists()
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_what_a_killed_writer_left_is_removed_and_an_error_leaves_nothing(tmp_path):
    left = tmp_path / f"out.tmp-{'0' * 32}" / "half"
    left.mkdir(parents=True)
    (left / "file").write_text("half")
    (left.parent / ".lock").touch()
    with pytest.raises(RuntimeError), new_output(tmp_path / "out") as staging:
        assert [entry.name for entry in staging.iterdir()] == [".lock"] and not left.exists()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"), new_output(tmp_path / "file" / "out"):
        pass


def test_json_of_a_model_is_what_a_merge_keeps(models, tmp_path):
    assert merge(tmp_path / "out", models / "b", models / "a") == 0
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept == json.loads((models / "b" / "config.json").read_text())


def test_weights_that_no_run_has_trained_have_no_card(tmp_path):
    weights = object.__new__(MegatronWeights)
    weights.checkpoint = manifest.Checkpoint(tmp_path, 0, {"model": {}}, {})
    assert _card(weights, tmp_path / "out", None) is None


class Calls:
    """Pickles as a call that makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_to_start_from_runs_nothing_and_needs_no_check_of_megatrons(models, tmp_path, monkeypatch):
    def fails(*arguments):
        raise TypeError("empty() got an unexpected keyword argument 'strides'")

    # As in megatron-core under torch 2.14 and later.
    monkeypatch.setattr(TorchDistLoadShardedStrategy, "load_tensors_metadata", fails)
    release, target = tmp_path / "megatron" / "release", tmp_path / "made"
    with alone() as groups:
        opened = open_weights(models / "a", groups)
        to_mcore(opened, tmp_path / "megatron", groups)
        model = build_model(opened.description, config_from(model="unused", data=("unused",)), groups)
        fill_weights(model, release, opened.description, groups)
        table = model[0].embedding.word_embeddings.weight
        assert torch.equal(table[:1003], weights(models / "a")["model.embed_tokens.weight"]) and not table[1003:].any()
        (release / "COMMIT.json").unlink()
        torch.save({"iteration": Calls(target)}, release / "common.pt")
        manifest.commit_weights_only(tmp_path / "megatron", {}, {})
        with pytest.raises(CheckpointError, match="does not fit this run.*it refers to posix.mkdir"):
            fill_weights(model, release, opened.description, groups)
    assert not target.exists()


def test_a_checkpoint_of_weights_that_are_no_numbers_is_not_exported(models, tmp_path, monkeypatch):
    broken = shutil.copytree(models / "a", tmp_path / "broken")
    found = load_file(broken / "model.safetensors")
    found["model.norm.weight"][3] = math.nan
    save_file(found, broken / "model.safetensors")
    with alone() as groups:
        opened = open_weights(broken, groups)
        with pytest.raises(NumericsError, match=f"{broken}/model.safetensors: model.norm.weight: found 1 of"):
            to_mcore(opened, tmp_path / "megatron", groups)
        with monkeypatch.context() as patch:
            patch.setattr(offline_convert, "require_finite", lambda values, where: None)
            to_mcore(opened, tmp_path / "megatron", groups)
        checkpoint = open_weights(tmp_path / "megatron", groups)
        with pytest.raises(NumericsError, match="model.safetensors: model.norm.weight: found 1 of"):
            to_hf(checkpoint, tmp_path / "hf")
        description = checkpoint.description
        model = build_model(description, config_from(model="unused", data=("unused",)), groups)
        with pytest.raises(NumericsError, match=f"{checkpoint.folder}: decoder.final_layernorm.weight: found 1 of"):
            fill_weights(model, checkpoint.folder, description, groups)
    assert not (tmp_path / "hf").exists()


def test_a_shard_that_would_call_something_is_refused_in_one_line_and_calls_nothing(
    models, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    release, rebuild = tmp_path / "megatron" / "release", b"ctorch._utils\n_rebuild_tensor_v2\n"
    with alone() as groups:
        to_mcore(open_weights(models / "a", groups), tmp_path / "megatron", groups)
    (release / "COMMIT.json").unlink()
    for shard in release.glob("*.distcp"):
        content = shard.read_bytes()
        call = b"cos\nmkdir\n"
        shard.write_bytes(content.replace(rebuild, call.ljust(len(rebuild) - 1, b"N") + b"0"))
    manifest.commit_weights_only(tmp_path / "megatron", {}, {})
    assert convert_hf.main(["mcore-to-hf", str(tmp_path / "megatron"), str(tmp_path / "hf")]) == 4
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "cannot be read (it refers to os.mkdir), expected a tensor" in told[0]
    assert not (tmp_path / "hf").exists()
