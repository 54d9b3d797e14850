"""Outputs that the backward computes again: the same gradients to the last bit, and the bytes that a layer keeps."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from simpo_megatron import parallel
from simpo_megatron.config import config_from
from simpo_megatron.data import BatchOptions, TokenizedPair, collate
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.mcore.families import describe_hf_config
from simpo_megatron.mcore.layers import recomputed
from simpo_megatron.mcore.layers.recomputed import computed_by, recomputing
from simpo_megatron.mcore.microbatch import output_of, to_microbatch
from simpo_megatron.mcore.model import build_model, zero_weights

CALLS: list[int] = []


def doubled(rows: Tensor) -> Tensor:
    CALLS.append(len(rows))
    return rows * 2


def linear_of_marked(rows: Tensor, weight: Tensor, *, view: tuple[int, ...] = (5, 3)) -> Tensor:
    return torch.nn.functional.linear(computed_by(rows * 2, doubled, rows).view(view), weight)


@pytest.fixture
def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).requires_grad_() for shape in ((5, 3), (4, 3)))


@pytest.mark.parametrize("view", [(5, 3), (5, 1, 3)])
def test_gradients_are_the_same_to_the_last_bit_and_the_output_is_freed(leaves, view):
    expected = torch.autograd.grad(linear_of_marked(*leaves, view=view).square().sum(), leaves)
    CALLS.clear()
    with recomputing():
        out = linear_of_marked(*leaves, view=view)
    assert CALLS == []
    found = torch.autograd.grad(out.square().sum(), leaves)
    assert CALLS == [5]
    assert all(map(torch.equal, found, expected))


def test_a_part_of_a_marked_output_is_kept_as_it_is(leaves):
    CALLS.clear()
    with recomputing():
        out = torch.nn.functional.linear(computed_by(leaves[0] * 2, doubled, leaves[0])[1:], leaves[1])
    (found,) = torch.autograd.grad(out.sum(), leaves[1])
    assert CALLS == []
    torch.testing.assert_close(found, (2 * leaves[0][1:]).detach().sum(0).expand(4, 3))


def test_an_output_that_was_changed_after_its_mark_is_kept(leaves):
    CALLS.clear()
    with recomputing():
        marked = computed_by(leaves[0] * 2, doubled, leaves[0])
        out = torch.nn.functional.linear(marked.add_(1), leaves[1])
    (found,) = torch.autograd.grad(out.sum(), leaves[1])
    assert CALLS == []
    torch.testing.assert_close(found, (2 * leaves[0] + 1).detach().sum(0).expand(4, 3))


@pytest.mark.parametrize("what", ["kept", "argument"])
def test_a_tensor_that_changes_before_the_backward_is_an_error(leaves, what):
    rows, weight = leaves[0] * 1, leaves[1]
    with recomputing():
        out = linear_of_marked(rows, weight) if what == "argument" else rows.sin()
    with torch.no_grad():
        rows.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_a_node_that_keeps_its_own_output_is_freed():
    with recomputing():
        out = torch.ones(3, requires_grad=True).exp()

    def hook(*_: Tensor) -> None:
        """Held by the node alone."""

    gone = weakref.ref(hook)
    out.grad_fn.register_hook(hook)
    del hook, out
    assert gone() is None


TINY = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
PAIRS = [(1, 5, 3), (29, 4, 8), (13, 9, 9)]
TOKENS = sum(map(sum, PAIRS))


@pytest.mark.parametrize("sharing", [True, False])
def test_a_layer_keeps_eight_tensors_of_a_pack(sharing, monkeypatch):
    """Inputs of both norms, queries, keys, values and outputs of attention, gate and up; and a few small numbers."""
    cpu_patches.install()
    description, config = describe_hf_config(TINY, "config.json"), config_from(model="m", data=("d",), bf16=False)
    num_tokens = TOKENS + (0 if sharing else sum(prompt for prompt, *_ in PAIRS))
    pairs = [TokenizedPair(*(np.ones(length, dtype=np.int32) for length in lengths)) for lengths in PAIRS]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> recomputed._Kept | recomputed._Recipe:
        packed = pack(tensor)
        if isinstance(packed, recomputed._Kept) and tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return packed

    pack = recomputed._pack
    monkeypatch.setattr(recomputed, "_pack", keep)
    with parallel.alone() as groups:
        (model,) = build_model(description, config, groups)
        zero_weights([model])
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        options = BatchOptions(global_batch_size=len(pairs), prefix_sharing=sharing)
        microbatch = to_microbatch(collate(pairs, range(len(pairs)), options), torch.device("cpu"))
        out = output_of(model, microbatch)
    assert out.requires_grad
    heads, groups_, size, hidden, width = 6, 2, 8, 48, 80
    of_tensors = 2 * hidden + 2 * heads * size + 2 * groups_ * size + 2 * width
    # The scale of each norm's row, and the log-sum-exp of each head.
    small = 2 + heads
    assert sum(kept.values()) == 4 * num_tokens * (of_tensors + small)
