"""Experts multiplied together are the experts one by one: values, gradients and names, wherever their weights lie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simpo_megatron import parallel
from simpo_megatron.config import Machine, config_from
from simpo_megatron.mcore import cpu_patches, device

EXPERTS, HIDDEN, WIDTH = 5, 24, 16
# One expert has no token, one has one.
COUNTS = [4, 0, 7, 1, 3]


@pytest.fixture(scope="module")
def groups():
    cpu_patches.install()
    with parallel.alone() as groups:
        parallel.seed_everything(0)
        yield groups


@pytest.fixture
def experts(groups):
    """Makes megatron's experts of a kind, their weights drawn from one seed."""
    from tiny_experts import experts_of

    def make(kind: type, dtype: torch.dtype, *, is_fused: bool = False, has_bias: bool = False):
        made = experts_of(kind, EXPERTS, hidden=HIDDEN, width=WIDTH, dtype=dtype, has_bias=has_bias)
        generator = torch.Generator().manual_seed(1)
        for parameter in made.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(drawn)
            if is_fused:
                parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.promote_types(dtype, torch.float32))
                parameter.grad_added_to_main_grad = False
        made.config.gradient_accumulation_fusion = is_fused
        return made

    return make


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(sum(COUNTS), HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    probs = torch.rand(sum(COUNTS), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return rows, probs, torch.randn(sum(COUNTS), HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def computed(experts, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, gradients of rows and probabilities, and those of the weights by their names."""
    rows, probs, slope = inputs(dtype)
    output, bias = experts(rows, torch.tensor(COUNTS), probs)
    assert bias is None
    output.backward(slope)
    weights = [p.main_grad if hasattr(p, "main_grad") else p.grad for _, p in sorted(experts.named_parameters())]
    return [output.detach(), rows.grad, probs.grad, *weights]


def twin(experts) -> list[Tensor]:
    """The same, an expert at a time in float64 by plain torch."""
    rows, probs, slope = (x.detach().double() for x in inputs(torch.float64))
    rows.requires_grad_()
    probs.requires_grad_()
    named = {name: p.detach().double().requires_grad_() for name, p in experts.named_parameters()}
    outputs = []
    for number, (own, weight) in enumerate(zip(rows.split(COUNTS), probs.split(COUNTS), strict=True)):
        gate, up = (own @ named[f"local_experts.{number}.linear_fc1.weight"].t()).chunk(2, dim=-1)
        inner = F.silu(gate) * up * weight[:, None]
        outputs.append(inner @ named[f"local_experts.{number}.linear_fc2.weight"].t())
    output = torch.cat(outputs)
    leaves = [rows, probs, *(p for _, p in sorted(named.items()))]
    return [output.detach(), *torch.autograd.grad(output, leaves, slope)]


def lay_out(experts, how: str) -> None:
    """Put the weights where a distributed optimizer would, in one buffer."""
    order = {"as made": None, "last first": -1, "gaps": -1, "uneven": -1}[how]
    if order is None:
        return
    weights = [
        getattr(expert, name).weight for expert in experts.local_experts for name in ("linear_fc1", "linear_fc2")
    ]
    gap = {"last first": 0, "gaps": 64, "uneven": 8}[how]
    buffer = torch.zeros(sum(w.numel() for w in weights) + 20 * gap, dtype=weights[0].dtype)
    start = 0
    for number, weight in enumerate(reversed(weights)):
        place = buffer[start : start + weight.numel()].view_as(weight)
        place.copy_(weight.data)
        weight.data = place
        start += weight.numel() + (gap if how != "uneven" or number == 3 else 0)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("is_fused", [False, True], ids=["autograd", "main_grad"])
@pytest.mark.parametrize("how", ["as made", "last first", "gaps"])
# Products of 24 and 16 in fp32; exact loops in the place of the kernel in float64, which torch's does not take.
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_values_and_gradients_are_those_of_one_by_one(experts, monkeypatch, dtype, budget, how, is_fused):
    from simpo_megatron.mcore.layers import grouped_experts

    calls = []
    real = grouped_experts.grouped_product

    def watched(rows, weight, offsets):
        calls.append(tuple(weight.shape))
        if dtype == torch.float32:
            return real(rows, weight, offsets)
        parts = rows.tensor_split(offsets[:-1].tolist())
        return torch.cat([part @ matrix for part, matrix in zip(parts, weight, strict=True)])

    monkeypatch.setattr(grouped_experts, "grouped_product", watched)
    grouped = experts(grouped_experts.GroupedExperts, dtype, is_fused=is_fused)
    lay_out(grouped, how)
    found, expected = computed(grouped, dtype), twin(grouped)
    assert len(calls) == 4, "two forward, two backward"
    assert len(found) == len(expected) == 3 + 2 * EXPERTS
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.isfinite().all() and error(one, other) <= budget, number
    if is_fused:
        assert all(parameter.grad_added_to_main_grad for parameter in grouped.parameters())


def test_weights_that_lie_unevenly_are_multiplied_one_by_one(experts, monkeypatch):
    from simpo_megatron.mcore.layers import grouped_experts

    monkeypatch.setattr(grouped_experts, "grouped_product", lambda *_: pytest.fail("they do not lie together"))
    grouped = experts(grouped_experts.GroupedExperts, torch.float64)
    lay_out(grouped, "uneven")
    for one, other in zip(computed(grouped, torch.float64), twin(grouped), strict=True):
        assert error(one, other) <= 1e-14


def test_experts_with_a_bias_are_computed_one_by_one(experts):
    from simpo_megatron.mcore.layers import GroupedExperts

    for has_bias, step in ((False, 1), (True, None)):
        made = experts(GroupedExperts, torch.float32, has_bias=has_bias)
        assert made._step(list(made.local_experts)) == step


def test_what_ddp_does_before_a_layer_is_done_before_each_weight_is_read(experts):
    from simpo_megatron.mcore.layers import GroupedExperts

    grouped, seen = experts(GroupedExperts, torch.float32), []
    for name, module in grouped.named_modules():
        module.register_forward_pre_hook(lambda module, _, name=name: seen.append(name))
    computed(grouped, torch.float32)
    with_weights = {name.removesuffix(".weight") for name, _ in grouped.named_parameters()}
    assert with_weights <= set(seen)


def test_checkpoints_name_the_same_tensors(experts):
    from megatron.core.transformer.moe.experts import SequentialMLP

    from simpo_megatron.mcore.layers import GroupedExperts

    described = [
        {
            name: (tensor.key, tensor.global_shape, tensor.global_offset, tensor.replica_id)
            for name, tensor in experts(kind, torch.float32).sharded_state_dict("x.").items()
            if hasattr(tensor, "global_shape")
        }
        for kind in (SequentialMLP, GroupedExperts)
    ]
    assert described[0] == described[1] and described[0]


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "vocab_size": 131,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("distributed", [False, True], ids=["own weights", "distributed optimizer"])
def test_under_megatrons_ddp_a_model_takes_them_and_has_the_same_gradients(groups, monkeypatch, distributed):
    """bf16, as on a GPU; the distributed optimizer's buffer has the last expert first."""
    from simpo_megatron.mcore.families import describe_hf_config
    from simpo_megatron.mcore.layers import grouped_experts
    from simpo_megatron.mcore.model import build_model, wrap_in_ddp

    calls, gradients, logits = [], [], []
    real = grouped_experts.grouped_product
    monkeypatch.setattr(grouped_experts, "grouped_product", lambda *a: calls.append(1) or real(*a))
    config = config_from(model="m", data=("d",), bf16=True, use_distributed_optimizer=distributed)
    tokens = torch.randint(131, (3, 11), generator=torch.Generator().manual_seed(3))
    for capability in (None, (9, 0)):
        monkeypatch.setattr(device, "machine", lambda capability=capability: Machine(compute_capability=capability))
        (model,) = build_model(describe_hf_config(MIXTRAL, "config.json"), config, groups)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        (wrapped,) = wrap_in_ddp([model], config)
        model.config.moe_aux_loss_scale = 1.0
        out = wrapped(tokens, torch.arange(11).expand(3, -1), None)
        (out.float() ** 2).sum().backward()
        logits.append(out.detach())
        gradients.append({name: p.main_grad.clone() for name, p in model.named_parameters()})
    assert len(calls) == 2 * 4, "of the second model alone"
    assert gradients[0].keys() == gradients[1].keys()
    # bf16 rounds every product by up to 2^-9; both forms round the same ones, in sums of another order.
    assert error(logits[1], logits[0].double()) <= 1e-2
    for name, expected in gradients[0].items():
        assert error(gradients[1][name], expected.double()) <= 3e-2, name


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, False), ((8, 0), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_only_where_torch_has_a_kernel(capability, expected):
    from simpo_megatron.mcore.layers import has_grouped_product

    assert has_grouped_product(capability) is expected
