"""Hugging Face folder -> Megatron checkpoint -> Hugging Face folder is every bit of every tensor, in any layout.

Between the two, any layout reads the checkpoint as it would have read the folder, megatron-core reads it without this
package, and what other layouts write comes back to the same folder.
"""

from __future__ import annotations

import json
import os
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
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config

from simpo_megatron.mcore import device

device.install()

from simpo_megatron.convert.files import stored_tensors  # noqa: E402
from simpo_megatron.errors import CheckpointError  # noqa: E402
from simpo_megatron.offline.convert import to_hf, to_mcore  # noqa: E402
from simpo_megatron.offline.weights import open_weights  # noqa: E402
from simpo_megatron.parallel import alone  # noqa: E402

TINY = {
    "vocab_size": 259,  # prime, and padded to 384 or 512
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
# Name: (configuration, dtype in the file).
MODELS = {
    "llama": (LlamaConfig(**TINY), "bfloat16"),
    "tied": (LlamaConfig(**TINY, tie_word_embeddings=True), "float16"),
    "qwen2_biases": (Qwen2Config(**TINY), "bfloat16"),
    "phi3_fused": (Phi3Config(**TINY), "float32"),
    "gemma2": (Gemma2Config(**TINY, head_dim=16, query_pre_attn_scalar=12, sliding_window=8), "bfloat16"),
}
LAYOUTS = {"tp2": {"tensor_model_parallel_size": 2}, "pp2": {"pipeline_model_parallel_size": 2}}
TOOL = [sys.executable, "-W", "ignore", "tools/convert_hf.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    torch.manual_seed(5)
    for name, (config, dtype) in MODELS.items():
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)
        (folder / name / "tokenizer_config.json").write_text("{}")
        with alone() as groups:
            to_mcore(open_weights(folder / name, groups), folder / f"{name}.megatron", groups)
    (folder / "job.json").write_text(json.dumps({"models": list(MODELS), "layouts": LAYOUTS}))
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


@pytest.mark.parametrize("written_by", ["megatron", *LAYOUTS])
@pytest.mark.parametrize("name", MODELS)
def test_the_way_there_and_back_keeps_every_bit(folder: Path, name: str, written_by: str) -> None:
    out = folder / f"{name}.{written_by}.hf"
    with alone() as groups:
        weights = open_weights(folder / f"{name}.{written_by}", groups)
        if written_by == "megatron":
            to_hf(weights, out, max_shard_bytes=60_000)
            assert len(list(out.glob("model-*.safetensors"))) > 2 and (out / "tokenizer_config.json").is_file()
            check_same_model(out, folder / name)
        else:
            # The layouts hold their weights in fp32.
            to_hf(weights, out, dtype=getattr(torch, MODELS[name][1]))
            check_same_model(out, folder / name)
    assert not list(folder.glob(".*"))


def test_a_folder_with_several_dtypes_keeps_each(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "llama" / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in weights.items()}
    mixed_folder = tmp_path / "mixed"
    mixed_folder.mkdir()
    (mixed_folder / "config.json").write_text((folder / "llama" / "config.json").read_text())
    save_file(mixed, mixed_folder / "model.safetensors")
    with alone() as groups:
        to_mcore(open_weights(mixed_folder, groups), tmp_path / "megatron", groups)
        to_hf(open_weights(tmp_path / "megatron", groups), tmp_path / "hf")
        check_same_model(tmp_path / "hf", mixed_folder)
        mixed["model.layers.0.self_attn.k_proj.weight"] = mixed["model.layers.0.self_attn.k_proj.weight"].float()
        save_file(mixed, mixed_folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="k_proj.*become one tensor.*--dtype"):
            to_mcore(open_weights(mixed_folder, groups), tmp_path / "other", groups)
    assert not (tmp_path / "other").exists()


def test_what_is_damaged_or_would_be_overwritten_is_refused(folder: Path, tmp_path: Path) -> None:
    with alone() as groups:
        weights = open_weights(folder / "llama", groups)
        to_mcore(weights, tmp_path / "megatron", groups)
        with pytest.raises(CheckpointError, match="exists already"):
            to_mcore(weights, tmp_path / "megatron", groups)
        with pytest.raises(CheckpointError, match="no export of simpo_megatron"):
            to_hf(weights, folder / "tied")
        shard = tmp_path / "megatron" / "release" / "__0_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match="__0_0.distcp: its bytes changed"):
            open_weights(tmp_path / "megatron", groups)
        with pytest.raises(CheckpointError, match="config.json: not found"):
            open_weights(tmp_path, groups)


def test_a_failed_or_killed_conversion_leaves_no_output_to_the_next(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    command = [*TOOL, "mcore-to-hf", str(folder / "llama.megatron"), str(out)]
    # A limit on the size of files stands for a full disk.
    limited = ["bash", "-c", f"ulimit -f 20; {' '.join(command)}"]
    full = subprocess.run(limited, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert full.returncode == 4 and "out: could not be written (File too large)" in full.stderr
    assert not list(tmp_path.iterdir())
    running = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial/*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MiB/s), peak memory" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_same_model(out, folder / "llama")
