"""Answers of the device module with and without CUDA, and megatron-core's options from our configuration."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

from simpo_megatron.config import Machine, config_from
from simpo_megatron.errors import ConfigError
from simpo_megatron.loss import products, triton_needs
from simpo_megatron.mcore import cpu_patches, device


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu_patches.install()


class TransformerEnginesAdam:
    __module__ = "transformer_engine.pytorch.optimizers.fused_adam"


def test_what_computes_is_told_by_what_is_installed(gpu, monkeypatch):
    optimizer = importlib.import_module("megatron.core.optimizer")
    of_torch = "layers: torch, attention: FlashAttention 2, Adam: torch, grad accumulation fusion:"
    monkeypatch.setattr(device, "missing_for_triton", lambda: "a C compiler")
    assert device.kernels(bf16=True) == f"{of_torch} on, loss: torch, for Triton lacks a C compiler"
    monkeypatch.setattr(device, "has_wide_products", lambda: False)
    monkeypatch.setattr(device, "missing_for_triton", lambda: None)
    assert device.kernels(bf16=True) == f"{of_torch} off, loss: Triton"
    monkeypatch.setattr(device, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(optimizer, "Adam", TransformerEnginesAdam)
    engines = "layers: Transformer Engine, Adam: Transformer Engine, grad accumulation fusion:"
    assert device.kernels(bf16=True) == f"{engines} off, loss: Triton"
    monkeypatch.setattr(device, "has_apex", lambda: True)
    assert device.kernels(bf16=True) == f"{engines} on, loss: Triton"
    # Its attention has no fp32, and its products would be TF32.
    assert device.kernels(bf16=False).startswith("layers: torch, attention: torch, a call a segment, Adam: ")
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    assert device.kernels(bf16=True) == "layers: torch, Adam: Transformer Engine, grad accumulation fusion: off"


def test_triton_needs_a_compiler_and_pythons_header(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_needs.importlib.util, "find_spec", lambda name: None)
    assert triton_needs.missing_for_triton.__wrapped__() == "the package triton"
    monkeypatch.setattr(triton_needs.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert triton_needs.missing_for_triton.__wrapped__() == "a C compiler"
    (tmp_path / "gcc").touch(mode=0o755)
    assert triton_needs.missing_for_triton.__wrapped__() is None
    monkeypatch.setattr(triton_needs.sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(triton_needs.sysconfig, "get_path", lambda name: str(tmp_path))
    assert triton_needs.missing_for_triton.__wrapped__().startswith("Python.h")


def test_weight_gradients_are_added_in_fp32_where_torchs_kernel_takes_it(monkeypatch):
    """Before 2.10 the kernel refuses a total in fp32, though its shapes are taken."""
    for version, expected in (("2.13.0+cpu", True), ("2.10.0", True), ("2.10.0a0+git", False), ("2.9.1+cu128", False)):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert products.has_wide_products.__wrapped__() is expected, version


def test_the_device_of_a_machine_without_cuda(monkeypatch):
    assert (device.backend(), device.current_device()) == ("gloo", torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.machine() == Machine(
        has_cuda=False, has_transformer_engine=device.has_transformer_engine(), compute_capability=None
    )
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert device.machine().cuda == (12, 8)
    device.require_local_ranks(1000)


def test_too_few_gpus_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    device.require_local_ranks(4)
    with pytest.raises(ConfigError, match=r"found 8 ranks, expected at most 4, the GPUs of this machine; .*--tp"):
        device.require_local_ranks(8)


def test_each_rank_asks_its_own_gpu(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: [(8, 0), (9, 0)][number])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.machine().compute_capability == (9, 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK: found 2, expected less than 2, the GPUs of this machine; "):
        device.machine()


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    from transformers import LlamaConfig

    from simpo_megatron.mcore.families import describe_hf_model

    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(folder)
    return describe_hf_model(folder)


def config_with(**options):
    return config_from(model="somewhere", data=("pairs.jsonl",), **options)


def test_interleaving_never_batches_its_point_to_point_messages(description):
    """With two stages, megatron's default for interleaving exchanges gradients wrongly without a word."""
    from simpo_megatron.mcore.model import transformer_config

    plain = transformer_config(description, config_with(pp=2))
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)
    interleaved = transformer_config(description, config_with(pp=2, vpp=2))
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)


def test_the_loss_is_summed_and_divided_by_the_pairs_of_the_step(description):
    from simpo_megatron.mcore.model import transformer_config

    assert transformer_config(description, config_with()).calculate_per_token_loss is True


def test_products_add_up_weight_gradients_on_a_gpu_where_nothing_is_frozen(description, monkeypatch):
    from simpo_megatron.mcore.model import transformer_config

    assert transformer_config(description, config_with()).gradient_accumulation_fusion is False
    monkeypatch.setattr(device, "fuses_weight_gradients", lambda: True)
    assert transformer_config(description, config_with()).gradient_accumulation_fusion is True
    assert transformer_config(description, config_with(lora_rank=4)).gradient_accumulation_fusion is False


def test_every_option_given_to_megatron_is_one_of_its_own():
    """A misspelt field of a dataclass fails at once; one set on an instance, or removed upstream, would not."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from simpo_megatron.mcore.architecture import ArchitectureConfig

    owners = {
        "ArchitectureConfig": ArchitectureConfig,
        "DistributedDataParallelConfig": DistributedDataParallelConfig,
        "OptimizerConfig": OptimizerConfig,
    }
    known = {name: {field.name for field in dataclasses.fields(owner)} for name, owner in owners.items()}
    seen = set()
    for file in Path(device.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
            if called in owners:
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                assert given <= known[called], f"{file.name}: {given - known[called]}"
                seen.add(called)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                target = node.targets[0]
                if isinstance(target.value, ast.Name) and target.value.id == "mcore_config":
                    assert target.attr in known["ArchitectureConfig"], f"{file.name}: {target.attr}"
                    seen.add("mcore_config")
    assert seen == {*owners, "mcore_config"}, "the search above finds no call any more"
