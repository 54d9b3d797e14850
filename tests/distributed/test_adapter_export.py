"""Exported adapters are what megatron computed with: merged by hand, in the merged export, and loaded by PEFT.

Budget: logits of a few units, fp32, sums in different orders: 1e-5; merged weights: 1e-6.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma2Config, LlamaConfig, Phi3Config, Qwen3Config

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

WORKER = Path(__file__).with_name("adapter_worker.py")
RANK, ALPHA = 4, 6.0
LAYOUTS = {"tp2": {"tensor_model_parallel_size": 2}, "pp2": {"pipeline_model_parallel_size": 2}}
SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "phi3": lambda: Phi3Config(**SHAPE, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=16, sliding_window=8),
    # One key/value group, so that tensor-parallel ranks hold parts of it.
    "llama_one_group": lambda: LlamaConfig(**SHAPE | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "deepseek_v3": lambda: DeepseekV3Config(**SHAPE | LATENT | EXPERTS),
}
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10
)
EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
)
# Experts have no adapters, and route the tokens of their rank.
OPTIONS = {"deepseek_v3": {"sequence_parallel": True, "lora_targets": ("linear_qkv", "linear_proj")}}
# Adapters as PEFT makes them: its default targets for a Llama; all linear layers, each with its A; one fused layer.
GIVEN = {
    "of_peft_default": ("llama", {"r": RANK, "lora_alpha": 7, "use_rslora": True}),
    "of_all_layers": ("llama_one_group", {"r": RANK, "lora_alpha": 8, "target_modules": "all-linear"}),
    "of_some_parts": ("qwen3", {"r": 3, "lora_alpha": 9, "target_modules": ["k_proj", "up_proj", "down_proj"]}),
    "of_a_fused_layer": ("phi3", {"r": RANK, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}
MODULES = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
}
MODULES["qwen3"] = MODULES["gemma2"] = MODULES["llama_one_group"] = MODULES["llama"]
MODULES["deepseek_v3"] = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
TOKENS = [[(i * 37 + row) % 96 for i in range(12)] for row in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config(), dtype=torch.float32).save_pretrained(folder / name)
    for name in GIVEN:
        write_peft(folder, name)
    lora = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.3}
    given = [{"model": str(folder / model), "folder": str(folder / name)} for name, (model, _) in GIVEN.items()]
    job = {"models": list(CONFIGS), "layouts": LAYOUTS, "lora": lora, "options": OPTIONS, "tokens": TOKENS}
    job["given"] = given
    (folder / "job.json").write_text(json.dumps(job))
    run_ranks(WORKER, 2, str(folder), timeout=300)
    return folder


def write_peft(folder: Path, name: str) -> None:
    """A folder of PEFT's own, of adapters whose B is not zero."""
    model, settings = GIVEN[name]
    adapted = peft.get_peft_model(loaded(folder / model), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter_name, parameter in adapted.named_parameters():
        if ".lora_B." in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder / name)


each_model = pytest.mark.parametrize("model", CONFIGS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_layout
@each_model
def test_merged_weights_are_the_base_and_what_the_adapter_file_says(folder, model, layout):
    base, merged = (weights_of(folder / path) for path in (model, f"{model}-{layout}-merged"))
    adapter = load_file(folder / f"{model}-{layout}-adapter" / "adapter_model.safetensors")
    adapted = set()
    for name in adapter:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            adapted.add(f"{module}.weight")
            B = adapter[name.replace("lora_A", "lora_B")].double()
            expected = base[f"{module}.weight"].double() + ALPHA / RANK * B @ adapter[name].double()
            assert B.abs().max() > 0.1
            torch.testing.assert_close(merged[f"{module}.weight"].double(), expected, rtol=0, atol=1e-6)
    assert {name.split(".")[-2] for name in adapted} == MODULES[model]
    assert len(adapted) == 2 * len(MODULES[model])
    assert set(base) == set(merged)
    assert all(torch.equal(base[name], merged[name]) for name in set(base) - adapted)


@each_layout
@each_model
def test_the_merged_model_computes_megatrons_logits(folder, model, layout):
    found = loaded(folder / f"{model}-{layout}-merged")
    assert_same_logits(found, folder / f"{model}-{layout}.safetensors")


@each_layout
@each_model
def test_peft_loads_the_adapters_and_computes_megatrons_logits(folder, model, layout):
    adapted = peft.PeftModel.from_pretrained(loaded(folder / model), folder / f"{model}-{layout}-adapter")
    assert_same_logits(adapted, folder / f"{model}-{layout}.safetensors")
    assert adapted.peft_config["default"].base_model_name_or_path == str(folder / model)


def test_the_layers_that_megatron_joins_share_their_a_and_have_their_own_b(folder):
    adapter = load_file(folder / "llama-tp2-adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1"
    q, k, v = (f"{prefix}.self_attn.{name}_proj.lora_" for name in "qkv")
    assert torch.equal(adapter[f"{q}A.weight"], adapter[f"{k}A.weight"])
    assert torch.equal(adapter[f"{q}A.weight"], adapter[f"{v}A.weight"])
    assert [tuple(adapter[f"{name}B.weight"].shape) for name in (q, k, v)] == [(32, RANK), (16, RANK), (16, RANK)]


@each_layout
@pytest.mark.parametrize("name", GIVEN)
def test_adapters_of_peft_compute_its_logits_and_come_back_bit_for_bit(folder, name, layout):
    model, _ = GIVEN[name]
    found = load_file(f"{folder / name}-{layout}.safetensors")
    adapted = peft.PeftModel.from_pretrained(loaded(folder / model), folder / name).eval()
    with torch.no_grad():
        expected, base = adapted(torch.tensor(TOKENS)).logits, loaded(folder / model)(torch.tensor(TOKENS)).logits
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(found["adapters"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["merged"], expected, rtol=0, atol=1e-5)

    again = Path(f"{folder / name}-{layout}-again")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder / name, again))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config, exported = (json.loads((path / "adapter_config.json").read_text()) for path in (folder / name, again))
    for key in ("r", "lora_alpha", "use_rslora"):
        assert config[key] == exported[key]
    names = {module.rpartition(".")[2] for module in config["target_modules"]}
    assert names == set(exported["target_modules"])


def loaded(folder: Path) -> torch.nn.Module:
    # Gemma's soft cap is in eager attention only.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_logits(model: torch.nn.Module, stored: Path) -> None:
    expected = load_file(stored)["logits"]
    with torch.no_grad():
        found = model.eval()(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
