"""Hugging Face folders of every family, loaded under every layout, compute what transformers computes.

Budget. Logits have a standard deviation of about one; fp32 matrix products summed in another order over four
layers differ by a few 1e-6. 1e-4 is the promise; a wrong layout, bias, norm or rotary frequency misses it by
orders of magnitude. The way back has no budget: every bit of every tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from simpo_megatron.convert.files import stored_tensors

WORKER = Path(__file__).with_name("convert_worker.py")
VOCAB = 259  # prime: divides over no number of ranks
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Name: (configuration, dtype in the file).
MODELS = {
    "llama2_without_groups": (LlamaConfig(**{**TINY, "num_key_value_heads": 8}), "bfloat16"),
    "llama31_scaled_rope": (LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE), "bfloat16"),
    "llama32_tied": (
        LlamaConfig(**TINY, rope_parameters={**LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True),
        "float16",
    ),
    "llama_biases_linear_rope": (
        LlamaConfig(
            **TINY,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        ),
        "float32",
    ),
    "mistral_wide_heads_window": (MistralConfig(**TINY, head_dim=16, sliding_window=8), "bfloat16"),
    "qwen2_tied_windows_above": (
        Qwen2Config(**TINY, tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, max_window_layers=3),
        "bfloat16",
    ),
    "qwen3": (Qwen3Config(**TINY, head_dim=16), "bfloat16"),
    "phi3": (Phi3Config(**TINY), "float32"),
    "phi3_partial_rope": (
        Phi3Config(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "float32",
    ),
    "gemma2": (
        # Caps at which scores and logits of this size bend.
        Gemma2Config(
            **TINY,
            head_dim=16,
            query_pre_attn_scalar=12,
            sliding_window=8,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
        ),
        "bfloat16",
    ),
}
MIXTURES = {
    "mixtral": (MixtralConfig(**TINY, num_local_experts=6, num_experts_per_tok=2), "bfloat16"),
    "qwen3_moe": (
        Qwen3MoeConfig(
            **TINY,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=3,
            moe_intermediate_size=40,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        ),
        "bfloat16",
    ),
    "qwen3_moe_softmax_over_all": (
        Qwen3MoeConfig(**TINY, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40),
        "float32",
    ),
}
# Two ranks: what tp and pp leave over is data parallelism, of which one rank writes.
LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2_sequence_parallel_ep2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
    },
}
# (model, layout): experts in every way that divides them, and the rest as before.
RUNS = [(name, layout) for name in MODELS for layout in ("tp1", "tp2", "pp2", "pp2_vpp2")]
RUNS += [(name, layout) for name in MIXTURES for layout in ("tp2", "pp2", "ep2", "tp2_sequence_parallel_ep2")]
MODELS |= MIXTURES


def write_model(config, folder: Path, dtype: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers, in fp32 with the stored weights; none of them zero or one by initialisation."""
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return logits_of_transformers(folder, tokens)


@torch.no_grad()
def logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    # Loaded, not cast: a cast would round the rotary frequencies as well.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every model, loaded and exported under every layout by one start of two ranks."""
    folder = tmp_path_factory.mktemp("convert")
    torch.manual_seed(5)
    tokens = torch.randint(VOCAB, (2, 38))
    expected = {name: write_model(config, folder / name, dtype, tokens) for name, (config, dtype) in MODELS.items()}
    torch.save(expected, folder / "expected.pt")
    job = {
        "models": {name: dtype for name, (_, dtype) in MODELS.items()},
        "layouts": LAYOUTS,
        "runs": RUNS,
        "tokens": tokens.tolist(),
        "max_shard_bytes": 60_000,
    }
    (folder / "job.json").write_text(json.dumps(job))
    run_ranks(WORKER, 2, str(folder), timeout=300)
    return folder


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_megatron_computes_the_logits_that_transformers_computes(folder: Path, name: str, layout: str) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=True)[name]
    found = load_file(folder / f"{name}-{layout}.safetensors")["logits"]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_an_exported_model_has_every_bit_of_the_imported_one(folder: Path, name: str, layout: str) -> None:
    def contents(of: Path) -> dict[str, torch.Tensor]:
        files = {tensor.file for tensor in stored_tensors(of).values()}
        return {key: value for file in files for key, value in load_file(file).items()}

    before, after = contents(folder / name), contents(folder / f"{name}-{layout}")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key


def test_an_export_is_sharded_and_transformers_loads_it(folder: Path) -> None:
    exported = folder / "llama31_scaled_rope-pp2"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    sizes = [path.stat().st_size for path in exported.glob("model-*.safetensors")]
    assert len(sizes) > 4 and max(sizes) < 70_000
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * 2 for path in exported.glob("model-*") for tensor in load_file(path).values()
    )
    assert (exported / "tokenizer_config.json").is_file()
    job = json.loads((folder / "job.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(exported, dtype="auto").dtype == torch.bfloat16
    expected = torch.load(folder / "expected.pt", weights_only=True)["llama31_scaled_rope"]
    assert torch.equal(logits_of_transformers(exported, torch.tensor(job["tokens"])), expected)


def test_nothing_is_left_beside_the_exports(folder: Path) -> None:
    assert not list(folder.glob(".*"))
