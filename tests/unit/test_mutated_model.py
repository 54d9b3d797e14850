"""Files of a model and of adapters, mutated at random: each is read, or refused by name in bounded time."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from mutated_files import mutated_bytes, mutated_file, mutated_json, odd_places, removed, try_mutations, write_model
from safetensors.torch import load_file, save_file

from simpo_megatron.data import PairOptions, build_preference_dataset, load_tokenizer
from simpo_megatron.errors import SimPOError
from simpo_megatron.generation.engines import TransformersEngine
from simpo_megatron.limits import limited
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.mcore.families import FAMILIES, describe_hf_model
from simpo_megatron.mcore.family import TINY_MODEL

cpu_patches.install()

from simpo_megatron.checkpoint.adapter_checkpoint import open_adapter  # noqa: E402
from simpo_megatron.checkpoint.fingerprint import model_fingerprint  # noqa: E402
from simpo_megatron.checkpoint.model_source import find_adapter, find_model  # noqa: E402
from simpo_megatron.config.lora_section import LoRAConfig  # noqa: E402
from simpo_megatron.convert.adapter import adapter_tensors  # noqa: E402
from simpo_megatron.convert.folder import copy_model_files  # noqa: E402
from simpo_megatron.convert.samples import sampled_digests  # noqa: E402
from simpo_megatron.offline.weights import HfWeights  # noqa: E402

TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "additional_special_tokens": ["<x>"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copied(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


CONFIGS = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "phi3": {"model_type": "phi3"},
    **{
        name: {**TINY_MODEL, **next(iter(FAMILIES[name].tests.values())), "model_type": name}
        for name in ("deepseek_v3", "ernie4_5_moe", "gemma3_text", "gpt_oss")
    },
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
CONFIGS["gemma3_text"]["rope_parameters"] = {"full_attention": _ROPE, "sliding_attention": _ROPE}
CONFIGS["gpt_oss"]["attention_bias"] = True


@pytest.mark.parametrize("family", CONFIGS)
def test_config_json(family, copied):
    path = copied / "config.json"
    content = json.dumps(json.loads(path.read_bytes()) | CONFIGS[family]).encode()
    # The weights are those of a Llama.
    read = HfWeights if family == "llama" else describe_hf_model
    path.write_bytes(content)
    read(copied)
    try_mutations(family, lambda n: mutated_file(content, n), path.write_bytes, lambda: read(copied))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"])
def test_files_of_a_tokenizer(name, copied, tmp_path):
    path, pairs = copied / name, tmp_path / "pairs.jsonl"
    content = path.read_bytes() if path.exists() else json.dumps(TOKENS).encode()
    pairs.write_text(json.dumps({"prompt": "Which way?", "chosen": "North.", "rejected": "Down."}) + "\n")

    def read():
        tokenizer = load_tokenizer(copied)
        build_preference_dataset([str(pairs)], tokenizer, PairOptions(), tmp_path / "cache")

    try_mutations(name, lambda n: mutated_file(content, n), path.write_bytes, read)


def test_the_generation_config(copied, tmp_path):
    path, copy = copied / "generation_config.json", tmp_path / "copy"
    content = path.read_bytes()
    copy.mkdir()

    def read():
        TransformersEngine(copied)
        copy_model_files(copied, copy)

    try_mutations("generation_config", lambda n: mutated_file(content, n), path.write_bytes, read)


def test_the_index_of_weights(copied):
    path = copied / "model.safetensors.index.json"
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{number % 2}-of-2.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, copied / file)
    content = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    path.write_bytes(content)
    HfWeights(copied)
    try_mutations("index", lambda n: mutated_file(content, n), path.write_bytes, lambda: HfWeights(copied))


def test_headers_of_weights(copied):
    path = copied / "model.safetensors"
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])

    def mutate(numbers):
        if numbers.randrange(2):
            return mutated_bytes(content[:size], numbers) + content[size:]
        changed = json.dumps(mutated_json(header, numbers)).encode()
        return len(changed).to_bytes(8, "little") + changed + content[size:]

    def read():
        weights = HfWeights(copied)
        for name in weights.specs:
            weights.read(name)

    try_mutations("header", mutate, path.write_bytes, read)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter(name, model, tmp_path):
    description = describe_hf_model(model)
    settings = LoRAConfig(lora_rank=4, lora_alpha=8.0)
    tensors = {key: torch.zeros(shape) for key, shape in adapter_tensors(description, settings).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(model), "r": 4, "lora_alpha": 8, "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"], "use_rslora": False, "init_lora_weights": True, "bias": "none",
        "rank_pattern": {}, "revision": None, "use_dora": False, "layers_to_transform": None,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / name
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")

    def mutate(numbers):
        if name == "adapter_config.json":
            return mutated_file(content, numbers)
        changed = json.dumps(mutated_json(json.loads(content[8:size]), numbers)).encode()
        return len(changed).to_bytes(8, "little") + changed + content[size:]

    def read():
        source = find_model(tmp_path)
        for folder in (*source.adapters, find_adapter(tmp_path)):
            opened = open_adapter(folder, description)
            for tensor in opened.names:
                opened.read(tensor)

    read()
    try_mutations(name, mutate, path.write_bytes, read)


FILES_OF_A_MODEL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "LICENSE", "model.safetensors", "model.safetensors.index.json", "special_tokens_map.json",
    "additional_chat_templates/a.jinja",
)  # fmt: skip
MAY_BE_A_FOLDER = "LICENSE"


@pytest.mark.parametrize("name", FILES_OF_A_MODEL)
def test_what_is_no_file_in_a_model(name, copied, tmp_path):
    """It is named where it would be read, by the tokenizer, the converter or the comparison of ranks."""
    path, pairs = copied / name, tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Which way?", "chosen": "North.", "rejected": "Down."}) + "\n")
    if "index" in name:
        (copied / "model.safetensors").unlink()
    path.parent.mkdir(exist_ok=True)
    silent = []
    for kind, put in odd_places(path).items():
        removed(path)
        put()
        refused = []
        for read in (
            lambda: build_preference_dataset([str(pairs)], load_tokenizer(copied), PairOptions(), tmp_path / "cache"),
            lambda: HfWeights(copied),
            lambda: sampled_digests(copied),
            lambda: model_fingerprint(copied, tmp_path / "memory.json"),
        ):
            try:
                with limited(cpu_seconds=20, num_bytes=2 << 30):
                    read()
            except (SimPOError, OSError) as error:  # Callers of a fingerprint turn the latter into the former.
                refused.append(str(error))
                if name == "model.safetensors":
                    break  # its bytes are hashed once its header is known to be one
        if not any(name in text or "found no weights" in text for text in refused):
            silent.append(kind)
    assert silent == (["a folder", "nothing in it"] if name == MAY_BE_A_FOLDER else []), silent


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "LICENSE"])
def test_a_file_that_may_not_be_read_is_named_before_it_is_needed(name, copied, monkeypatch):
    (copied / name).touch()
    may = os.access  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: may(path, mode) and Path(path).name != name)
    with pytest.raises(SimPOError, match=f"{name}: cannot be read .Permission denied"):
        HfWeights(copied)
