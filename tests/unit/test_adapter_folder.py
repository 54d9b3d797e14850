"""PEFT folders in: what they hold becomes megatron's targets, or is refused by the key or module that says more."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config  # noqa: E402

from simpo_megatron.checkpoint.adapter_checkpoint import open_adapter  # noqa: E402
from simpo_megatron.checkpoint.model_source import find_adapter, find_model  # noqa: E402
from simpo_megatron.commands import plan  # noqa: E402
from simpo_megatron.config import config_from  # noqa: E402
from simpo_megatron.config.lora_section import LoRAConfig  # noqa: E402
from simpo_megatron.convert import require_targets  # noqa: E402
from simpo_megatron.errors import CheckpointError, ConfigError, SimPOError  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.training.start.run_plan import plan_run  # noqa: E402

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and, in "adapter", adapters of PEFT's on all that it adapts by default."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "base")
    write(folder, "adapter")
    return folder


def write(folder, name, **settings):
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings)
    peft.get_peft_model(base, config).save_pretrained(folder / name)
    return folder / name


def opened(folder, path):
    return open_adapter(path, describe_hf_model(folder / "base"))


def edited(folder, tmp_path, **keys):
    """A copy of the adapters with other keys in adapter_config.json."""
    shutil.copytree(folder / "adapter", tmp_path / "edited")
    config = json.loads((tmp_path / "edited" / CONFIG).read_text())
    (tmp_path / "edited" / CONFIG).write_text(json.dumps(config | keys))
    return tmp_path / "edited"


def test_parts_with_an_a_of_their_own_are_targets_of_their_own(folder):
    settings = opened(folder, folder / "adapter").settings
    assert settings.lora_targets == ("linear_q", "linear_v")
    assert (settings.lora_rank, settings.lora_alpha, settings.scale) == (4, 6, 1.5)
    assert settings.own_parts == {"linear_qkv": (0, 2)}


def test_parts_that_share_an_a_are_the_target_that_megatron_joins(folder, tmp_path):
    write(folder, "shared", target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "o_proj"])
    shared = folder / "shared" / WEIGHTS
    tensors = load_file(shared)
    for name in list(tensors):
        if "lora_A" in name and ("k_proj" in name or "v_proj" in name):
            tensors[name] = tensors[name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")].clone()
    save_file(tensors, shared)
    assert opened(folder, folder / "shared").settings.lora_targets == ("linear_qkv", "linear_proj", "linear_fc1_gate")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_dora": True}, "use_dora: found True, expected none"),
        ({"bias": "all"}, "bias: found all, expected none"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: found \['lm_head'\], expected none"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern: found {'q_proj': 8}"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern: found {'q_proj': 8}"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: found True"),
        ({"a_key_of_next_year": "x"}, "a_key_of_next_year: found x"),
        ({"peft_type": "IA3"}, "peft_type: found 'IA3', expected 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: found 'pissa', which changes the base model"),
        ({"r": 8}, "found adapters of another model or rank"),
        ({"r": "4"}, "adapter_config.json: "),
        ({"lora_alpha": None}, "adapter_config.json: "),
    ],
)
def test_kinds_of_adapters_that_are_not_computed_are_refused_by_their_key(folder, tmp_path, keys, said):
    path = edited(folder, tmp_path, **keys)
    with pytest.raises(SimPOError, match=said) as refused:
        opened(folder, path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight, expected base_model.model.MODULE"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1]},
            "layer 1 and on nothing in layer 0|found no adapters",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            "on nothing in layer 1 and on linear_q in layer 0",
        ),
        ({"target_modules": ["embed_tokens"]}, "expected base_model.model.MODULE.lora_A.weight"),
    ],
)
def test_adapters_on_other_modules_are_refused_by_their_names(folder, tmp_path, settings, said):
    shutil.copytree(folder / "base", tmp_path / "base")
    with pytest.raises(CheckpointError, match=said):
        opened(folder, write(tmp_path, "adapter", **settings))


def test_adapters_on_layers_that_the_model_has_not_are_refused(folder, tmp_path):
    path = edited(folder, tmp_path)
    tensors = {name.replace("v_proj", "router"): tensor for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(
        CheckpointError, match="found adapters on model.layers.0.self_attn.router, .*expected the attention"
    ):
        opened(folder, path)


def test_a_pickled_adapter_is_never_read(folder, tmp_path):
    path = edited(folder, tmp_path)
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.bin\\) are never read"):
        opened(folder, path)


def test_the_base_is_found_by_its_name_and_adapters_may_stand_on_adapters(folder, tmp_path):
    source = find_model(folder / "adapter")
    assert (source.base, source.adapters) == (folder / "base", (folder / "adapter",))
    above = edited(folder, tmp_path, base_model_name_or_path=str(folder / "adapter"))
    assert find_model(above).adapters == (folder / "adapter", above)
    gone = tmp_path / "gone"
    shutil.copytree(edited(folder, tmp_path / "more", base_model_name_or_path=str(gone)), tmp_path / "alone")
    with pytest.raises(CheckpointError, match=f"for the model '{gone}', which is not there"):
        find_model(tmp_path / "alone")
    itself = tmp_path / "itself"
    shutil.copytree(edited(folder, tmp_path / "last", base_model_name_or_path=str(itself)), itself)
    with pytest.raises(CheckpointError, match="found more than 8 adapters on one another"):
        find_model(itself)
    with pytest.raises(CheckpointError, match="adapter: found no adapters in"):
        find_adapter(folder / "base")


def planned(folder, **options):
    pairs = folder / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    lengths = {"max_length": 64, "max_prompt_length": 32}
    options = {"adapter": str(folder / "adapter"), **options}
    return plan_run(config_from(data=(str(pairs),), **lengths, **options), 1)


def test_rank_scale_layers_and_model_come_from_the_adapters(folder):
    found = planned(folder)
    assert found.sources.model == folder / "base"
    lora = found.config.lora
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_targets) == (4, 6, ("linear_q", "linear_v"))
    assert found.config.model.model == str(folder / "base")
    again = planned(folder, lora_rank=4, lora_alpha=6.0, lora_targets=("linear_v", "linear_q"))
    assert again.config.lora == lora
    for options, said in (
        ({"lora_rank": 8}, "lora_rank: found 8, expected 4, that of the adapters in"),
        ({"lora_targets": ("linear_q",)}, "lora_targets: found"),
        ({"lora_alpha": 8.0}, "lora_alpha: found 8.0, expected 6.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            planned(folder, **options)
    with pytest.raises(ConfigError, match="export_adapter: found out with a model that is itself adapters"):
        planned(folder, model=str(folder / "adapter"), export_adapter="out")


def test_adapters_that_name_no_model_go_on_beside_one_that_is_named(folder, tmp_path):
    nameless = edited(folder, tmp_path, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="expected the model .* train with --model BASE --adapter DIR"):
        planned(folder, adapter=str(nameless))
    assert planned(folder, adapter=str(nameless), model=str(folder / "base")).config.lora.lora_rank == 4


def test_a_plan_counts_the_adapters_that_go_on_training(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    options = ["--model", "base", "--gpus", "1", "--max-length", "64", "--max-prompt-length", "32"]
    assert plan.main([*options, "--adapter", "adapter"]) == 0
    found = capsys.readouterr().out
    assert "lora_rank: 4\nlora_alpha: 6.0\nlora_targets:\n- linear_q\n- linear_v\nadapter: adapter\n" in found
    assert plan.main([*options, "--adapter", "adapter", "--lora-rank", "8"]) == 2
    assert "lora_rank: found 8, expected 4, that of the adapters in adapter; leave it out" in capsys.readouterr().err
    assert plan.main([*options, "--adapter", "base"]) == 4
    assert "adapter: found no adapters in base" in capsys.readouterr().err


def test_a_layer_that_is_one_in_hugging_faces_model_too_has_no_parts(tmp_path):
    Phi3Config(**SHAPE, pad_token_id=0).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="lora_targets: found 'linear_q', expected linear_qkv, as phi3 has no layers of"
    ):
        require_targets(describe_hf_model(tmp_path), LoRAConfig(lora_rank=4, lora_targets=("linear_q", "linear_proj")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_targets": ("linear_qkv", "linear_q")}, "linear_qkv, whose parts share an A, or some of"),
        ({"use_rslora": True}, "use_rslora: found True, expected lora_alpha with it"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        LoRAConfig(lora_rank=4, **options)
