"""The memory of torch's AdamW, which megatron's optimizers use where no other Adam is installed, on every device."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpo_megatron.config import config_from
from simpo_megatron.mcore import cpu_patches, device
from simpo_megatron.mcore.optimizer import build_optimizer, reserve_moments, update


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and id(made) not in before and made._base is None:
                self.now += made.nbytes
                weakref.finalize(made, self._given_back, made.nbytes)
        self.most = max(self.most, self.now)
        return result

    def _given_back(self, num_bytes: int) -> None:
        self.now -= num_bytes


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu_patches.install()


@pytest.fixture
def chunk(tp_group):
    """A layer under megatron's DDP, whose gradients are there."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    layer = torch.nn.Sequential(torch.nn.Linear(37, 64), torch.nn.Linear(64, 5))
    layer.config = config
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), layer)
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(0.25)
    return chunk


def test_an_update_computes_the_norm_once_and_clips_by_it_as_megatrons_step_does(chunk, monkeypatch):
    """A second one would read all gradients again, and make the host wait for the device again."""
    calls: list[float] = []
    module = importlib.import_module("megatron.core.optimizer.optimizer")
    real = module.get_grad_norm_fp32
    monkeypatch.setattr(module, "get_grad_norm_fp32", lambda *a, **k: calls.append(real(*a, **k)) or calls[-1])
    config = config_from(model="m", data=("d",), lr=0.1, clip_grad=1.0)
    weights = [parameter.detach().clone() for parameter in chunk.parameters()]

    def after(change: Callable[..., Any]) -> list[torch.Tensor]:
        for parameter, weight in zip(chunk.parameters(), weights, strict=True):
            parameter.data.copy_(weight)
            parameter.main_grad.fill_(0.25)
        change(*build_optimizer([chunk], config, train_iters=4))
        return [parameter.detach().clone() for parameter in chunk.parameters()]

    expected = after(lambda optimizer, scheduler: optimizer.step())
    calls.clear()
    found = after(update)
    num_weights = sum(weight.numel() for weight in weights)
    assert calls == [pytest.approx(0.25 * num_weights**0.5)] and calls[0] > 1
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("has_cuda", [False, True], ids=["CPU", "GPU"])
def test_the_first_update_takes_what_the_memory_probe_reserves(chunk, has_cuda, monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: has_cuda)
    optimizer, _ = build_optimizer([chunk], config_from(model="m", data=("d",), fp32=True), train_iters=2)
    assert all(group["fused"] for group in optimizer.param_groups)
    parameters = list(chunk.parameters())
    reserved = sum(moments.nbytes for moments in reserve_moments(optimizer))
    assert reserved == 8 * sum(parameter.numel() for parameter in parameters)
    optimizer.prepare_grads()
    with Allocated() as allocated:
        for single in optimizer.chained_optimizers:
            single.optimizer.step()
    # Beside the moments a number of steps each, in fp32.
    assert allocated.most == reserved + 4 * len(parameters)
    assert reserve_moments(optimizer) == [], "the moments are there now"


def test_the_count_sees_what_the_default_of_torch_takes():
    parameters = [torch.nn.Parameter(torch.ones(50, 20)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with Allocated() as allocated:
        torch.optim.AdamW(parameters, foreach=True).step()
    # The moments, and a copy of all that changes a weight.
    assert allocated.most >= (8 + 4) * 3000
