"""The rotation in one pass is megatron's, values and gradients to the last bit, and keeps nothing of a layer's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from simpo_megatron.mcore.attention.rotation import rotated  # noqa: E402

MEGATRONS = rope_utils._apply_rotary_pos_emb_bshd.__wrapped__
S, B, A, D = 11, 2, 3, 10


def frequencies_of(size: int, *, interleaved: bool) -> torch.Tensor:
    half = 3 * torch.randn(S, 1, 1, size // 2, generator=torch.Generator().manual_seed(1))
    return half.repeat_interleave(2, dim=-1) if interleaved else torch.cat((half, half), dim=-1)


@pytest.mark.parametrize(
    ("interleaved", "size", "factor", "dtype"),
    list(itertools.product((False, True), (D, 4), (1.0, 1.3), (torch.float32, torch.float64, torch.bfloat16))),
)
def test_values_and_gradients_are_megatrons_to_the_last_bit(interleaved, size, factor, dtype):
    frequencies = frequencies_of(size, interleaved=interleaved)
    # A slice, as a layer's projection is divided into queries, keys and values.
    whole, slope = (torch.randn(S, B, A, width).to(dtype) for width in (3 * D, D))
    whole.requires_grad_()
    results = []
    for rotate in (
        lambda heads: MEGATRONS(heads, frequencies, rotary_interleaved=interleaved, mscale=factor),
        lambda heads: rotated(heads, frequencies, interleaved=interleaved, factor=factor),
        lambda heads: rope_utils._apply_rotary_pos_emb_bshd(heads, frequencies, interleaved, mscale=factor),
    ):
        out = rotate(whole[..., D : 2 * D])
        results.append((out, *torch.autograd.grad(out, whole, slope)))
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def test_gradcheck():
    frequencies = frequencies_of(4, interleaved=False).double()
    heads = torch.randn(S, 1, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotated(x, frequencies, interleaved=False, factor=1.1), (heads,))


def test_layers_share_the_factors_and_keep_no_tensor_of_their_own():
    kept: list[torch.Tensor] = []
    frequencies = frequencies_of(D, interleaved=False)
    heads = torch.randn(S, B, A, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outs = [rotated(heads, frequencies, interleaved=False, factor=1.0) for _ in range(2)]
    assert kept == [] and outs[0].grad_fn.factors is outs[1].grad_fn.factors
