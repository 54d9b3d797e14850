"""In a bf16 run the weights in fp32 are those that transformers keeps in fp32, with every bit, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DENSE, FIRST_MOES, MOES, write_model
from transformers import AutoModelForCausalLM

from simpo_megatron import parallel
from simpo_megatron.config import config_from
from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from simpo_megatron.convert import export_hf, load_hf_weights  # noqa: E402
from simpo_megatron.mcore.families import FAMILIES, describe_hf_model  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402
from simpo_megatron.offline.weights import HfWeights  # noqa: E402

# Of dense families none keeps any.
NAMES = [*FIRST_MOES, next(iter(FAMILIES["llama"].tests))]


@pytest.fixture(scope="module")
def groups():
    with parallel.alone() as groups:
        yield groups


@pytest.fixture(scope="module")
def chunk_of(groups, tmp_path_factory):
    """A function of a model's name: (megatron's bf16 model, folder of fp32 weights, folder of its export)."""
    folder = tmp_path_factory.mktemp("models")

    def load(name: str) -> tuple[torch.nn.Module, Path, Path]:
        before, after = folder / name / "before", folder / name / "after"
        torch.manual_seed(2)
        write_model((DENSE | MOES)[name][0], before, "float32")
        description = describe_hf_model(before)
        config = config_from(model=str(before), data=("unused",), max_length=32, max_prompt_length=16)
        chunks = build_model(description, config, groups)
        load_hf_weights(chunks, before, description, tp_rank=0, tp_size=1)
        export_hf(chunks, description, before, after, groups=groups, dtype=torch.bfloat16)
        return chunks[0], before, after

    return load


@pytest.mark.parametrize("name", NAMES)
def test_what_a_bf16_run_keeps_in_fp32_is_what_transformers_keeps(chunk_of, name: str) -> None:
    _, before, after = chunk_of(name)
    # What transformers trains, and what it writes of it.
    AutoModelForCausalLM.from_pretrained(before, dtype=torch.bfloat16).save_pretrained(before.with_name("theirs"))
    expected, found = HfWeights(before.with_name("theirs")), HfWeights(after)
    assert {name: spec.dtype for name, spec in found.specs.items()} == {
        name: spec.dtype for name, spec in expected.specs.items()
    }
    for tensor in found.specs:
        assert torch.equal(found.read(tensor), expected.read(tensor)), tensor


def test_an_ernie_router_multiplies_in_fp32_forward_and_backward(chunk_of) -> None:
    chunk, before, _ = chunk_of("ernie4_5_moe")
    router = chunk.decoder.layers[3].mlp.router
    stored = HfWeights(before).read("model.layers.3.mlp.gate.weight")
    assert stored.dtype == router.weight.dtype == torch.float32
    assert torch.equal(router.weight, stored) and not torch.equal(stored, stored.bfloat16().float())

    def gradients(weight: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((logits * torch.arange(logits.numel()).view(logits.shape)).sum(), (weight, hidden))

    hidden = torch.randn(7, 3, stored.shape[1]).bfloat16().requires_grad_()
    logits, twin = router.gating(hidden), stored.double().requires_grad_()
    wide = F.linear(hidden.double(), twin)
    # fp32 sums of 64 products, and bf16 for the gradient of what is bf16.
    torch.testing.assert_close(logits, wide.float(), rtol=0, atol=1e-5)
    of_weight, of_hidden = gradients(router.weight, hidden, logits)
    expected = gradients(twin, hidden, wide)
    assert (of_weight.dtype, of_hidden.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(of_weight.double(), expected[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(of_hidden, expected[1], rtol=2**-7, atol=1e-3)
