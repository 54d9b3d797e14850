"""Adapters on one rank: what is trained, what is refused, what recomputation and Transformer Engine need."""

from __future__ import annotations

import importlib

import pytest
import torch

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from megatron.core.extensions import transformer_engine  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from packaging.version import Version  # noqa: E402
from transformers import Gemma2Config, LlamaConfig  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.config import Machine, config_from, lint, resolve  # noqa: E402
from simpo_megatron.config.lora_section import LORA_TARGETS  # noqa: E402
from simpo_megatron.errors import ConfigError  # noqa: E402
from simpo_megatron.mcore import specs  # noqa: E402
from simpo_megatron.mcore.architecture import ArchitectureConfig  # noqa: E402
from simpo_megatron.mcore.attention.segmented_attention import SegmentedAttention  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.mcore.lora import Adapter  # noqa: E402
from simpo_megatron.mcore.model import build_model, wrap_in_ddp  # noqa: E402
from simpo_megatron.mcore.optimizer import build_optimizer  # noqa: E402
from simpo_megatron.mcore.specs import mlp_submodules, transformer_engine_layer_spec  # noqa: E402

RANK = 4


@pytest.fixture(scope="module")
def groups():
    with parallel.alone() as groups:
        parallel.seed_everything(1)
        yield groups


TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(**TINY).save_pretrained(folder)
    return describe_hf_model(folder)


def config(**options):
    return config_from(model="m", data=("d",), bf16=False, **options)


def model_of(description, groups, **options):
    """One chunk whose weights, the adapters' apart, are drawn from a fixed seed."""
    (chunk,) = build_model(description, config(**options), groups)
    torch.manual_seed(2)
    for name, parameter in chunk.named_parameters():
        if "_adapter." not in name:
            parameter.data.normal_(std=0.1)
    return chunk


def logits(chunk):
    tokens = torch.arange(10)[None] * 7 % 128
    return chunk(tokens, torch.arange(10)[None], None)


def fill_b(chunk):
    torch.manual_seed(3)
    for name, parameter in chunk.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.1)


def test_gradients_buffers_and_moments_are_the_adapters_alone(groups, description):
    chunk = model_of(description, groups, lora_rank=RANK)
    adapters = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    expected = {
        f"decoder.layers.{layer}.{owner}.{target}_adapter.{part}"
        for layer in range(2)
        for owner, targets in (("self_attention", LORA_TARGETS[:2]), ("mlp", LORA_TARGETS[2:]))
        for target in targets
        for part in ("lora_A", "lora_B")
    }
    assert adapters == expected
    sizes = ((32, 64), (32, 32), (32, 96), (48, 32))  # inputs and outputs of qkv, proj, fc1, fc2
    num_trained = 2 * RANK * sum(map(sum, sizes))
    assert sum(p.numel() for p in chunk.parameters() if p.requires_grad) == num_trained

    (ddp,) = wrap_in_ddp([chunk], config())
    assert sum(bucket.grad_data.numel() for buffer in ddp.buffers for bucket in buffer.buckets) == num_trained
    optimizer, _ = build_optimizer([ddp], config(), 3)
    logits(ddp).sum().backward()
    assert all((p.grad is None) and hasattr(p, "main_grad") == p.requires_grad for p in chunk.parameters())
    optimizer.step()
    moments = [value for state in optimizer.optimizer.state.values() for value in state.values() if value.dim()]
    assert sum(moment.numel() for moment in moments) == 2 * num_trained


def test_an_adapter_that_has_learned_nothing_changes_no_bit(groups, description):
    with torch.no_grad():
        base = logits(model_of(description, groups))
        chunk = model_of(description, groups, lora_rank=RANK)
        assert torch.equal(logits(chunk), base)
        fill_b(chunk)
        assert not torch.allclose(logits(chunk), base)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
    ],
    ids=["full", "selective"],
)
def test_recomputation_loses_no_gradient_behind_a_frozen_embedding(groups, description, recompute):
    """With adapters in the MLP alone, nothing before the first recomputed part would ask for a gradient."""
    options = {"lora_rank": RANK, "lora_targets": ("linear_fc1", "linear_fc2")}
    found = []
    for more in ({}, recompute):
        chunk = model_of(description, groups, **options, **more)
        fill_b(chunk)
        logits(chunk).square().sum().backward()
        found.append([p.grad for p in chunk.parameters() if p.requires_grad])
    assert len(found[0]) == 8
    for expected, recomputed in zip(*found, strict=True):
        assert torch.equal(recomputed, expected)


def test_an_adapter_adds_before_the_norm_of_its_layers_output(groups, tmp_path):
    Gemma2Config(**TINY, head_dim=8).save_pretrained(tmp_path)
    chunk = model_of(describe_hf_model(tmp_path), groups, lora_rank=RANK)
    fill_b(chunk)
    with torch.no_grad():
        adapted = logits(chunk)
        for module in chunk.modules():
            for name, adapter in module.named_children():
                if isinstance(adapter, Adapter):
                    linear = getattr(module, name.removesuffix("_adapter"))
                    linear.weight += adapter.added_weight(adapter.lora_B)
                    adapter.lora_B.zero_()
        torch.testing.assert_close(logits(chunk), adapted, rtol=0, atol=1e-4 * float(adapted.std()))


def test_dropout_meets_only_what_enters_an_adapter_in_training(groups, description):
    chunk = model_of(description, groups, lora_rank=RANK, lora_dropout=0.5)
    fill_b(chunk)
    chunk.eval()
    without = model_of(description, groups, lora_rank=RANK)
    fill_b(without)
    with torch.no_grad():
        assert torch.equal(logits(chunk), logits(without))
        chunk.train()
        assert not torch.equal(logits(chunk), logits(chunk))
        for module in chunk.modules():
            if isinstance(module, Adapter):
                module.lora_B.zero_()
                without_adapter = module
        assert torch.equal(logits(chunk), logits(model_of(description, groups)))
        assert without_adapter.dropout == 0.5


def test_transformer_engines_layers_leave_the_norm_outside_for_adapters(monkeypatch):
    """Transformer Engine cannot be imported without CUDA: the layers' classes are what can be checked here."""
    provider = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
    monkeypatch.setattr(provider, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    config = ArchitectureConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    layer = transformer_engine_layer_spec(config).submodules
    fused = transformer_engine.TELayerNormColumnParallelLinear
    assert layer.self_attention.submodules.linear_qkv is mlp_submodules(layer).linear_fc1 is fused
    layer = transformer_engine_layer_spec(config, fuse_norms=False).submodules
    plain = transformer_engine.TEColumnParallelLinear
    assert layer.self_attention.submodules.linear_qkv is mlp_submodules(layer).linear_fc1 is plain
    assert layer.input_layernorm is layer.pre_mlp_layernorm is transformer_engine.TENorm
    config.attn_logit_softcapping = 50.0
    attention = transformer_engine_layer_spec(config).submodules.self_attention.submodules
    assert attention.core_attention is SegmentedAttention
    # Sinks, which 2.9 has for no pack.
    config.attn_logit_softcapping, config.softmax_type = None, "learnable"
    for version, is_torchs in (("2.9.0", True), ("2.20.2", False)):
        monkeypatch.setattr(
            specs, "is_te_min_version", lambda least, version=version: Version(version) >= Version(least)
        )
        attention = transformer_engine_layer_spec(config).submodules.self_attention.submodules
        assert (attention.core_attention is SegmentedAttention) == is_torchs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank: found 0, expected a number above 0"),
        ({"lora_rank": 8, "lora_alpha": -1.0}, "lora_alpha: found -1.0"),
        ({"lora_rank": 8, "lora_dropout": 1.0}, "lora_dropout: found 1.0"),
        ({"lora_rank": 8, "lora_targets": ("q_proj",)}, "one or more of linear_qkv, linear_proj, linear_fc1"),
        ({"lora_rank": 8, "lora_targets": ("linear_qkv", "linear_qkv")}, "each once"),
        ({"lora_rank": 8, "lora_targets": ()}, "lora_targets: found ''"),
        ({"lora_alpha": 8.0}, "lora_alpha: found 8.0, expected lora_rank with it"),
        ({"lora_targets": ("linear_qkv",)}, "expected lora_rank with it"),
        ({"export_adapter": "a"}, "export_adapter: found 'a', expected lora_rank with it"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(ConfigError) as refused:
        config(**options)
    assert message in str(refused.value)


def test_a_rank_that_is_not_low_is_refused(description):
    with pytest.raises(ConfigError, match="lora_rank: found 33, expected at most 32"):
        resolve(config(lora_rank=33), world_size=1, model=description.transformer, machine=Machine())


def test_the_default_learning_rate_is_said_to_be_a_full_models():
    assert any("adapters" in warning for warning in lint(config(lora_rank=8)))
    assert lint(config(lora_rank=8, lr=5e-6)) == []
