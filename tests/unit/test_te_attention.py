"""The arguments of Transformer Engine for a pack.

Transformer Engine cannot be imported without CUDA, so a stand-in takes its place that records its arguments and
computes what they mean, one sequence at a time; the result must be the CPU attention's.
"""

import importlib
import inspect
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine

from simpo_megatron.loss import ResponseTokens
from simpo_megatron.mcore.attention.segmented_attention import SegmentedAttention
from simpo_megatron.mcore.microbatch import MicrobatchLayout, Segment
from simpo_megatron.mcore.microbatch.context import ContextShare

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

    cp_stream = "megatron's stream"

    def __init__(self, attention_type):
        super().__init__()
        self.attention_type = attention_type
        self.config = SimpleNamespace(context_parallel_size=1)
        self.divided_over = []

    def set_context_parallel_group(self, *arguments):
        self.divided_over.append(arguments)

    def forward(self, *args, **kwargs):
        return "megatron's own path"


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", MegatronWrapper)
    monkeypatch.delitem(sys.modules, "simpo_megatron.mcore.attention.te_attention", raising=False)
    yield importlib.import_module("simpo_megatron.mcore.attention.te_attention").TESegmentedAttention(
        attention_type="self"  # as megatron's SelfAttention asks for it
    )
    sys.modules.pop("simpo_megatron.mcore.attention.te_attention", None)


def configuration(window_size):
    return SimpleNamespace(
        attention_dropout=0.0,
        window_size=window_size,
        window_attn_skip_freq=None,
        attn_logit_softcapping=None,
        softmax_type="vanilla",
        qk_layernorm=False,
    )


def rows(num_heads):
    return torch.randn(SEGMENTS[-1].end, 1, num_heads, SIZE, dtype=torch.float64, requires_grad=True)


def layout(context=None):
    return MicrobatchLayout.of_pack(torch.arange(SEGMENTS[-1].end), SEGMENTS, context)


@pytest.mark.parametrize("window_size", [None, (3, 0)])
def test_a_pack_means_the_same_to_the_kernel_as_to_the_attention_on_the_cpu(attention, window_size):
    torch.manual_seed(0)
    attention.window_size = window_size
    tensors = rows(HEADS), rows(GROUPS), rows(GROUPS)
    expected = SegmentedAttention(configuration(window_size), 1, None, "self")(*tensors, packed_seq_params=layout())
    found = attention(*tensors, packed_seq_params=layout())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, tensors, weight), torch.autograd.grad(expected, tensors, weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class Neighbours(ContextShare):
    """One of two context-parallel ranks, which is shown the keys of both as if they had been gathered."""

    keys: torch.Tensor

    def gather(self, own_s):
        assert torch.equal(own_s, self.keys[self.rows()])
        return torch.cat([self.keys[self._rows_of(rank)] for rank in range(self.group.size())])


@pytest.mark.parametrize("kernel", ["Transformer Engine's", "torch's"])
@pytest.mark.parametrize("window_size", [None, (3, 0)])
def test_each_of_two_context_parallel_ranks_computes_its_rows_of_a_pack(attention, kernel, window_size):
    torch.manual_seed(1)
    attention.window_size, attention.config.context_parallel_size = window_size, 2
    torchs = SegmentedAttention(configuration(window_size), 1, None, "self")
    query, key, value = rows(HEADS), rows(GROUPS), rows(GROUPS)
    expected = torchs(query, key, value, packed_seq_params=layout())
    for rank in range(2):
        share = Neighbours(SimpleNamespace(rank=lambda: rank, size=lambda: 2), len(query))  # noqa: B023
        object.__setattr__(share, "keys", torch.cat((key, value), dim=-1))
        own = share.rows()
        divided = layout(share)
        module = attention if kernel == "Transformer Engine's" else torchs
        found = module(query[own], key[own], value[own], packed_seq_params=divided)
        torch.testing.assert_close(found, expected[own], rtol=0, atol=1e-12)
    # Keys are gathered by us, so Transformer Engine is told to compute with what it is given.
    assert attention.divided_over == ([(None, None, None, "p2p")] * 2 if kernel == "Transformer Engine's" else [])


def test_padded_rows_are_divided_by_transformer_engine_itself(attention, monkeypatch):
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 5])
    group = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    share = ContextShare(group, 24)
    tokens = ResponseTokens(torch.tensor([11, 12, 40, 47]), *[torch.arange(4)] * 2, num_pairs=2)
    divided = MicrobatchLayout.of_padded_rows(24, 2, share)
    # Of 24 positions of two rows, this rank has 6 to 17; flat rows are 2 * position + row.
    assert divided.position_ids_S.tolist() == list(range(6, 18))
    labels = tokens.of_rows(share.rows(), 24, 2)
    assert labels.rows_N.tolist() == [0] and labels.targets_N.tolist() == [1]
    attention.config.context_parallel_size = 2
    found = attention(rows(HEADS), rows(GROUPS), rows(GROUPS), packed_seq_params=divided)
    assert found == "megatron's own path"
    # Rows that a rank holds whole, such as those of a probe, are nobody else's.
    whole = MicrobatchLayout.of_padded_rows(24)
    attention(rows(HEADS), rows(GROUPS), rows(GROUPS), packed_seq_params=whole)
    assert attention.divided_over == [(group, [4, 5], MegatronWrapper.cp_stream, "p2p"), (None, None, None, "p2p")]


def test_the_kernel_is_told_lengths_format_and_mask(attention):
    attention(rows(HEADS), rows(GROUPS), rows(GROUPS), packed_seq_params=layout())
    arguments = attention.arguments
    assert arguments["qkv_format"] == "thd"
    assert arguments["attn_mask_type"] == "padding_causal_bottom_right"
    assert arguments["cu_seqlens_q"].tolist() == [0, 7, 12, 13, 19, 24]
    assert arguments["cu_seqlens_kv"].tolist() == [0, 7, 15, 16, 23, 28]
    assert arguments["cu_seqlens_q"].dtype == arguments["cu_seqlens_kv"].dtype == torch.int32
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_kv"]) == (256, 256), "bounds, in steps"
    assert attention.attention_type == "cross", "keys are masked by their own lengths, not by those of the queries"


# Source: DotProductAttention of the wheels transformer-engine 2.9.0 and 2.20.2, which has all of these and more.
def forward_of_2_9(
    query_layer,
    key_layer,
    value_layer,
    attention_mask=None,
    qkv_format=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    cu_seqlens_q_padded=None,
    cu_seqlens_kv_padded=None,
    max_seqlen_q=None,
    max_seqlen_kv=None,
    attn_mask_type=None,
    window_size=None,
): ...


def set_context_parallel_group_of_2_9(cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p"): ...


def test_transformer_engine_has_every_argument_that_a_pack_is_computed_with(attention):
    """Megatron itself gives those of the constructor but `attention_type`, which both versions have."""
    attention.config.context_parallel_size = 2
    attention(rows(HEADS), rows(GROUPS), rows(GROUPS), packed_seq_params=layout())
    inspect.signature(forward_of_2_9).bind("query", "key", "value", None, **attention.arguments)
    (divided_over,) = attention.divided_over
    inspect.signature(set_context_parallel_group_of_2_9).bind(*divided_over)


def test_padded_rows_take_megatrons_own_path(attention):
    padded = MicrobatchLayout.of_padded_rows(24)
    assert attention(rows(HEADS), rows(GROUPS), rows(GROUPS), packed_seq_params=padded) == "megatron's own path"
