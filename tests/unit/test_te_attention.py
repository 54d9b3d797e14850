"""What Transformer Engine is handed for a pack.

Transformer Engine cannot be imported without CUDA, so a stand-in takes its place that records its arguments and
computes what they mean, one sequence at a time; the result must be the CPU attention's.
"""

import importlib
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine

from simpo_megatron.mcore.attention import MicrobatchLayout, Segment, SegmentedAttention

HEADS, GROUPS, SIZE = 4, 2, 8
SEGMENTS = (
    Segment(0, 7, 0, 0),
    Segment(7, 12, 0, 3),
    Segment(12, 13, 0, 0),
    Segment(13, 19, 12, 13),
    Segment(19, 24, 0, 0),
)


class Kernel(torch.nn.Module):
    """DotProductAttention's place: variable-length attention, bottom-right causal, by its own arguments alone."""

    window_size = None  # megatron gives it to the constructor, and no call names another

    def forward(self, query, key, value, attention_mask, **arguments):
        self.arguments = arguments
        assert attention_mask is None and "window_size" not in arguments
        outputs = []
        starts = zip(arguments["cu_seqlens_q"].tolist(), arguments["cu_seqlens_kv"].tolist(), strict=True)
        for (q0, k0), (q1, k1) in pairwise(starts):
            diagonal = k1 - k0 - (q1 - q0)
            visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(diagonal)
            if self.window_size is not None:
                visible = visible.triu(diagonal - self.window_size[0])
            rows = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            outputs.append(F.scaled_dot_product_attention(*rows, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)


class MegatronWrapper(Kernel):
    """TEDotProductAttention's place."""

    def forward(self, *args, **kwargs):
        return "megatron's own path"


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", MegatronWrapper)
    monkeypatch.delitem(sys.modules, "simpo_megatron.mcore.te_attention", raising=False)
    yield importlib.import_module("simpo_megatron.mcore.te_attention").TESegmentedAttention()
    sys.modules.pop("simpo_megatron.mcore.te_attention", None)


def rows(num_heads):
    return torch.randn(SEGMENTS[-1].end, 1, num_heads, SIZE, dtype=torch.float64, requires_grad=True)


def layout():
    return MicrobatchLayout.of_pack(torch.arange(SEGMENTS[-1].end), SEGMENTS, None)


@pytest.mark.parametrize("window_size", [None, (3, 0)])
def test_a_pack_means_the_same_to_the_kernel_as_to_the_attention_on_the_cpu(attention, window_size):
    torch.manual_seed(0)
    attention.window_size = window_size
    tensors = rows(HEADS), rows(GROUPS), rows(GROUPS)
    config = SimpleNamespace(
        attention_dropout=0.0, window_size=window_size, window_attn_skip_freq=None, attn_logit_softcapping=None
    )
    expected = SegmentedAttention(config, 1, None, "self")(*tensors, packed_seq_params=layout())
    found = attention(*tensors, packed_seq_params=layout())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, tensors, weight), torch.autograd.grad(expected, tensors, weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_kernel_is_told_lengths_format_and_mask(attention):
    attention(rows(HEADS), rows(GROUPS), rows(GROUPS), packed_seq_params=layout())
    arguments = attention.arguments
    assert arguments["qkv_format"] == "thd"
    assert arguments["attn_mask_type"] == "padding_causal_bottom_right"
    assert arguments["cu_seqlens_q"].tolist() == [0, 7, 12, 13, 19, 24]
    assert arguments["cu_seqlens_kv"].tolist() == [0, 7, 15, 16, 23, 28]
    assert arguments["cu_seqlens_q"].dtype == arguments["cu_seqlens_kv"].dtype == torch.int32
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_kv"]) == (7, 8)


def test_padded_rows_take_megatrons_own_path(attention):
    padded = MicrobatchLayout.of_padded_rows(24, None)
    assert attention(rows(HEADS), rows(GROUPS), rows(GROUPS), packed_seq_params=padded) == "megatron's own path"
