"""The redirection of megatron-core to the CPU is narrow, and absent where CUDA is; options given to it exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from simpo_megatron.config import Machine, config_from
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import device


@pytest.fixture(scope="module", autouse=True)
def installed():
    device.install()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as it shows before anything is computed."""
    monkeypatch.setattr(device, "has_cuda", lambda: True)


class TransformerEnginesAdam:
    __module__ = "transformer_engine.pytorch.optimizers.fused_adam"


@pytest.mark.parametrize(("adam", "expected"), [(TransformerEnginesAdam, []), (torch.optim.AdamW, ["_restore"])])
def test_install_mends_nothing_but_torchs_adam_where_cuda_is_there(gpu, monkeypatch, adam, expected):
    ran = []
    for name, _ in inspect.getmembers(device, inspect.isfunction):
        if name.startswith(("_replace", "_import", "_name", "_restore", "_route", "_run")):
            monkeypatch.setattr(device, name, lambda n=name: ran.append(n))
    monkeypatch.setattr(importlib.import_module("megatron.core.optimizer"), "Adam", adam)
    assert device.install.__wrapped__() is None
    assert [name[: len("_restore")] for name in ran] == expected


def test_what_computes_is_told_by_what_is_installed(gpu, monkeypatch):
    optimizer, layers = (importlib.import_module(f"megatron.core.{n}") for n in ("optimizer", "tensor_parallel.layers"))
    after = "grad accumulation fusion: off"
    assert device.kernels() == f"layers of torch, Adam of torch, {after}"
    monkeypatch.setattr(device, "_has_transformer_engine", lambda: True)
    monkeypatch.setattr(optimizer, "Adam", TransformerEnginesAdam)
    assert device.kernels() == f"layers of Transformer Engine, Adam of Transformer Engine, {after}"
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    assert device.kernels().endswith("grad accumulation fusion: on")
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    assert device.kernels() == f"layers of torch, Adam of Transformer Engine, {after}"


def test_install_runs_once():
    step = torch.Tensor.type
    device.install()
    assert torch.Tensor.type is step


def test_tensor_type_tells_the_truth_to_everybody_but_megatrons_optimizers():
    tensor = torch.zeros(2)
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    told = {}
    asks = "answer = tensor.type(); other = tensor.type(torch.float64)"
    for module in ("megatron.core.optimizer.clip_grads", "megatron.core.tensor_parallel.layers", "another"):
        scope = {"__name__": module, "tensor": tensor, "torch": torch}
        exec(asks, scope)
        told[module] = scope["answer"]
        assert scope["other"].dtype == torch.float64
    assert told == {
        "megatron.core.optimizer.clip_grads": "torch.cuda.FloatTensor",
        "megatron.core.tensor_parallel.layers": "torch.FloatTensor",
        "another": "torch.FloatTensor",
    }


def test_only_the_modules_that_name_cuda_allocate_on_the_cpu_instead():
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
    assert schedules.torch.tensor([1], dtype=torch.int).dtype == torch.int
    assert schedules.torch.nn is torch.nn
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    assert layers.torch is torch
    assert not isinstance(torch, device._TorchOnCpu)


@pytest.mark.parametrize("module", device._MODULES_NAMING_CUDA)
def test_every_redirected_module_of_the_installed_megatron_still_names_cuda(module):
    """One that no longer does should leave the list; its allocations would not need us."""
    source = Path(importlib.import_module(module).__file__).read_text()
    named = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    asks_for_device = "torch.cuda.current_device()" in source
    assert "cuda" in named or asks_for_device, f"{module} names no CUDA device"


def test_the_device_of_a_machine_without_cuda():
    assert (device.backend(), device.current_device()) == ("gloo", torch.device("cpu"))
    assert device.machine() == Machine(
        has_cuda=False, has_transformer_engine=device._has_transformer_engine(), compute_capability=None
    )
    device.require_local_ranks(1000)


def test_too_few_gpus_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    device.require_local_ranks(4)
    with pytest.raises(ConfigError, match=r"needs 8 ranks, this machine has 4 GPUs: .*--tp"):
        device.require_local_ranks(8)


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


def test_products_add_up_weight_gradients_where_apex_can_and_nothing_is_frozen(description, monkeypatch):
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


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_gradients_are_scaled_where_they_are_by_megatrons_rule(factor):
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    source = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected, rounded, in_place = torch.empty(5, 3), torch.empty(5, 3, dtype=torch.bfloat16), source.clone()
    local_multi_tensor_scale(0, None, [[source], [expected]], factor)
    clip_grads.multi_tensor_scale_impl(0, None, [[in_place, source], [in_place, rounded]], factor)
    assert torch.equal(in_place, expected) and torch.equal(rounded, expected.to(torch.bfloat16))
