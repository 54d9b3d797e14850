"""Hugging Face folder -> Megatron checkpoint -> Hugging Face folder is every bit of every tensor, in any layout.

Between the two, any layout reads the checkpoint as it would have read the folder, and megatron-core reads it without
this package. Checkpoints of other layouts come back to the same folder.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import REPOSITORY, run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import DENSE, FIRST_MOES, MOES, write_model
from transformers import AutoModelForCausalLM

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from simpo_megatron.atomic import draft_of  # noqa: E402
from simpo_megatron.checkpoint import manifest, torch_dist  # noqa: E402
from simpo_megatron.convert.stored_tensors import stored_tensors  # noqa: E402
from simpo_megatron.errors import CheckpointError  # noqa: E402
from simpo_megatron.offline.convert import to_hf, to_mcore  # noqa: E402
from simpo_megatron.offline.weights import open_weights  # noqa: E402
from simpo_megatron.parallel import alone  # noqa: E402
from tools import convert_hf  # noqa: E402

# What ranks read and write, too, where the others go there and back in this process alone.
DENSE_OF_RANKS = ("llama31_scaled_rope", "llama32_tied", "qwen2_tied_windows_above", "phi3", "gemma2")
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}
RUNS = [(name, layout) for name in DENSE_OF_RANKS for layout in ("tp2", "pp2")]
RUNS += [(name, layout) for name in FIRST_MOES for layout in ("pp2", "ep2")]
# What attention divides in ways of its own: the matrices behind latents, and sinks.
RUNS += [(name, "tp2") for name in ("deepseek_v3", "gpt_oss")]
MODELS = DENSE | MOES
LLAMA = "llama31_scaled_rope"
TOOL = [sys.executable, "-W", "ignore", "tools/convert_hf.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    torch.manual_seed(5)
    for name, (config, dtype) in MODELS.items():
        write_model(config, folder / name, dtype)
        with alone() as groups:
            to_mcore(open_weights(folder / name, groups), folder / f"{name}.megatron", groups)
    (folder / "job.json").write_text(json.dumps({"runs": RUNS, "layouts": LAYOUTS}))
    run_ranks(Path(__file__).with_name("offline_worker.py"), 2, str(folder), timeout=240)
    return folder


def check_same_model(found: Path, expected: Path) -> None:
    before, after = stored_tensors(expected), stored_tensors(found)
    assert after.keys() == before.keys()
    for name, stored in before.items():
        with safe_open(stored.file, "pt") as file, safe_open(after[name].file, "pt") as other:
            old, new = file.get_tensor(name), other.get_tensor(name)
            assert new.dtype == old.dtype and torch.equal(new, old), name
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_the_way_there_and_back_keeps_every_bit(folder: Path, name: str) -> None:
    out = folder / f"{name}.hf"
    with alone() as groups:
        to_hf(open_weights(folder / f"{name}.megatron", groups), out, max_shard_bytes=60_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2 and (out / "tokenizer_config.json").is_file()
    check_same_model(out, folder / name)
    prompts = torch.arange(60).view(3, 20)
    with torch.no_grad():
        models = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder / name, out))
        before, after = (model(prompts).logits for model in models)
    assert before.std() > 0.1 and torch.equal(before, after)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_what_another_layout_has_written_comes_back_whole(folder: Path, name: str, layout: str) -> None:
    out = folder / f"{name}.{layout}.hf"
    with alone() as groups:
        # The layouts hold their weights in fp32.
        to_hf(open_weights(folder / f"{name}.{layout}", groups), out, dtype=getattr(torch, MODELS[name][1]))
    check_same_model(out, folder / name)


def test_a_folder_with_several_dtypes_keeps_each(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / LLAMA / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in weights.items()}
    mixed_folder = tmp_path / "mixed"
    mixed_folder.mkdir()
    (mixed_folder / "config.json").write_text((folder / LLAMA / "config.json").read_text())
    save_file(mixed, mixed_folder / "model.safetensors")
    with alone() as groups:
        to_mcore(open_weights(mixed_folder, groups), tmp_path / "megatron", groups)
        to_hf(open_weights(tmp_path / "megatron", groups), tmp_path / "hf")
        check_same_model(tmp_path / "hf", mixed_folder)
        mixed["model.layers.0.self_attn.k_proj.weight"] = mixed["model.layers.0.self_attn.k_proj.weight"].float()
        save_file(mixed, mixed_folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="k_proj.*expected one dtype, as they become one tensor.*--dtype"):
            to_mcore(open_weights(mixed_folder, groups), tmp_path / "other", groups)
    assert not (tmp_path / "other").exists()


def test_what_is_damaged_or_would_be_overwritten_is_refused(folder: Path, tmp_path: Path) -> None:
    with alone() as groups:
        weights = open_weights(folder / LLAMA, groups)
        to_mcore(weights, tmp_path / "megatron", groups)
        with pytest.raises(CheckpointError, match="already exists"):
            to_mcore(weights, tmp_path / "megatron", groups)
        with pytest.raises(CheckpointError, match="that simpo_megatron did not write"):
            to_hf(weights, folder / "llama32_tied")
        shard = tmp_path / "megatron" / "release" / "__0_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match="__0_0.distcp: .*its bytes changed"):
            to_hf(open_weights(tmp_path / "megatron", groups), tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
        with pytest.raises(CheckpointError, match="config.json: found no such file"):
            open_weights(tmp_path, groups)


def test_a_large_checkpoint_is_several_files_each_verified_before_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(torch_dist, "_SHARD_BYTES", 40_000)
    read, checked, real = [], [], manifest.check_hashes
    monkeypatch.setattr(manifest, "check_hashes", lambda *args: checked.extend(args[1]) or real(*args))
    with alone() as groups:
        to_mcore(open_weights(folder / LLAMA, groups), tmp_path / "megatron", groups)
        shards = sorted(path.name for path in (tmp_path / "megatron" / "release").glob("*.distcp"))
        assert len(shards) > 2 and shards[0] == "__0_0.distcp"
        to_hf(open_weights(tmp_path / "megatron", groups), tmp_path / "hf", max_shard_bytes=60_000)
        assert set(shards) <= set(checked)
        check_same_model(tmp_path / "hf", folder / LLAMA)
        last = tmp_path / "megatron" / "release" / shards[-1]
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
        opened = open_weights(tmp_path / "megatron", groups)
        with pytest.raises(CheckpointError, match=f"{shards[-1]}: .*its bytes changed"):
            for name in opened.specs:
                opened.read(name)
                read.append(name)
        assert 0 < len(read) < len(opened.specs)


def test_a_checkpoint_without_the_file_of_one_rank_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000007"
    shutil.copytree(folder / f"{LLAMA}.tp2" / checkpoint.name, checkpoint)
    (checkpoint / "__1_0.distcp").unlink()
    with alone() as groups, pytest.raises(CheckpointError, match="__1_0.distcp: found no plain file"):
        open_weights(tmp_path, groups)


@pytest.mark.parametrize("command", ["hf-to-mcore", "mcore-to-hf"])
def test_a_full_disk_or_a_kill_leaves_no_output_to_the_next(folder: Path, tmp_path: Path, capsys, command: str) -> None:
    out = tmp_path / "out"
    arguments = [command, str(folder / (LLAMA if command == "hf-to-mcore" else f"{LLAMA}.megatron")), str(out)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of files stands for a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert convert_hf.main(arguments) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "out: could not be written (" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    kill_when_it_writes(arguments, tmp_path)
    (left,) = tmp_path.iterdir()
    assert draft_of(left) == "out"
    assert convert_hf.main(arguments) == 0
    assert "MiB/s), peak memory" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if command == "hf-to-mcore":
        with alone() as groups:
            to_hf(open_weights(out, groups), tmp_path / "back")
    check_same_model(tmp_path / "back" if command == "hf-to-mcore" else out, folder / LLAMA)


def kill_when_it_writes(arguments: list[str], parent: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([*TOOL, *arguments], cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(parent.glob("out.tmp-*/*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "linked.safetensors"])
def test_an_index_that_leaves_its_folder_converts_to_nothing(folder: Path, tmp_path: Path, capsys, name: str) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside.safetensors"
    source.mkdir()
    shutil.copyfile(folder / LLAMA / "config.json", source / "config.json")
    shutil.copyfile(folder / LLAMA / "model.safetensors", outside)
    (source / "linked.safetensors").symlink_to(outside)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    before = sorted(tmp_path.rglob("*"))
    assert convert_hf.main(["hf-to-mcore", str(source), str(tmp_path / "out")]) == 4
    told = capsys.readouterr().err
    assert name in told and "file inside the folder" in told
    assert sorted(tmp_path.rglob("*")) == before
