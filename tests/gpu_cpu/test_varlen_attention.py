"""Attention of a GPU without Transformer Engine: one call a layer, its arguments, and what they mean.

The arguments are held on the meta device, where torch's own operator runs. Numbers are compared in float64 on the CPU,
with the operator's contract, written out, in its place.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from counting import Counter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simpo_megatron.mcore import varlen_kernels
from simpo_megatron.mcore.attention import segmented_attention as attention_module
from simpo_megatron.mcore.attention.segmented_attention import SegmentedAttention
from simpo_megatron.mcore.microbatch import MicrobatchLayout, Segment
from simpo_megatron.mcore.microbatch.context import ContextShare
from simpo_megatron.mcore.varlen_kernels import Scores, varlen_kernel

varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has variable-length attention from 2.10 on")

META = torch.device("meta")
SIZE = 8
PACKS = {
    "no prefix": [(0, 7, 0, 0), (7, 8, 0, 0), (8, 21, 0, 0)],
    "long prefix": [(0, 40, 0, 0), (40, 41, 0, 33), (41, 60, 0, 33)],
    "two pairs and padding": [(0, 9, 0, 0), (9, 17, 0, 4), (17, 25, 0, 0), (25, 28, 17, 22), (28, 32, 0, 0)],
}
HEADS = {"as many groups as heads": (4, 4), "grouped": (6, 2), "one group": (8, 1)}


@pytest.fixture(autouse=True)
def fresh():
    """Kernels are looked up once a process."""
    yield
    varlen_kernels._torch_kernel.cache_clear()
    varlen_kernels._flash_attn_kernel.cache_clear()
    varlen_kernels.prepare_torch.cache_clear()


def attention(window=None, cap=None, scale=None, dropout=0.0) -> SegmentedAttention:
    config = SimpleNamespace(
        attention_dropout=dropout,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
        attn_logit_softcapping=cap,
        softmax_type="vanilla",
        qk_layernorm=False,
    )
    return SegmentedAttention(config, 1, None, "self", softmax_scale=scale)


def layout_of(segments, context=None) -> MicrobatchLayout:
    return MicrobatchLayout.of_pack(torch.arange(segments[-1][1]), tuple(Segment(*s) for s in segments), context)


def inputs(length, num_rows, heads, **options) -> list[Tensor]:
    num_heads, num_groups = heads
    options = {"requires_grad": True, "dtype": torch.bfloat16, "device": META} | options
    return [torch.randn(length, num_rows, number, SIZE, **options) for number in (num_heads, num_groups, num_groups)]


class Calls(TorchDispatchMode):
    """Records the calls of torch's variable-length operators."""

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        recorded = {"_varlen_attn": self.forward, "_varlen_attn_backward": self.backward}.get(
            func.__name__.split(".")[0]
        )
        if recorded is not None:
            defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            recorded.append(defaults | dict(zip(names, args)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("window", "scale"), [(None, None), (1, None), (6, 0.25)])
def test_a_pack_is_one_call_with_bottom_right_causal_arguments(segments, heads, window, scale):
    tensors = inputs(segments[-1][1], 1, heads)
    layout = layout_of(segments).on(META)
    with Calls() as calls:
        out = attention(window, scale=scale)(*tensors, packed_seq_params=layout)
        out.backward(torch.empty_like(out))
    (call,), (_,) = calls.forward, calls.backward
    num_keys = [end - start + prefix_end - prefix_start for start, end, prefix_start, prefix_end in segments]
    assert call["query"].shape == (segments[-1][1], heads[0], SIZE)
    assert call["key"].shape == call["value"].shape == (sum(num_keys), heads[1], SIZE)
    for name in ("cu_seq_q", "cu_seq_k"):
        assert call[name].shape == (len(segments) + 1,) and call[name].dtype == torch.int32
        assert call[name].device == META
    assert (call["max_q"], call["max_k"]) == (max(end - start for start, end, *_ in segments), max(num_keys))
    # (-1, 0): as many keys to the left as there are and none to the right, which is causal.
    assert call["window_size"] == [-1 if window is None else window - 1, 0]
    assert call["is_causal"] is (window is None)
    assert call["enable_gqa"] is (heads[0] != heads[1])
    assert call["scale"] == scale
    assert out.shape == (segments[-1][1], 1, heads[0] * SIZE) and out.dtype == torch.bfloat16
    assert [x.grad.shape for x in tensors] == [x.shape for x in tensors]


@pytest.mark.parametrize("layout", [MicrobatchLayout.of_padded_rows(12, 3).on(META), None], ids=["padded", "none"])
def test_rows_are_one_call_of_a_sequence_each(layout):
    tensors = inputs(12, 3, (6, 2))
    with Calls() as calls:
        out = attention(5)(*tensors, packed_seq_params=layout)
        out.backward(torch.empty_like(out))
    (call,), (_,) = calls.forward, calls.backward
    assert call["query"].shape == (36, 6, SIZE) and call["key"].shape == (36, 2, SIZE)
    assert call["cu_seq_q"].shape == call["cu_seq_k"].shape == (4,)
    assert (call["max_q"], call["max_k"], call["window_size"]) == (12, 12, [4, 0])
    assert out.shape == (12, 3, 6 * SIZE) and out.is_contiguous()


def test_launches_of_a_layer_do_not_grow_with_its_segments():
    counts = []
    for num_pairs in (1, 20):
        segments = [
            s for i in range(num_pairs) for s in ((i * 30, i * 30 + 20, 0, 0), (i * 30 + 20, i * 30 + 30, 0, 12))
        ]
        layout, tensors = layout_of(segments).on(META), inputs(segments[-1][1], 1, (8, 2))
        with Counter() as counter:
            out = attention()(*tensors, packed_seq_params=layout)
            out.backward(torch.empty_like(out))
        counts.append([operation.name for operation in counter.operations])
    assert counts[0] == counts[1]
    # Two gathers of keys and values and their sums backward, and the kernel.
    assert len(counts[0]) <= 10, counts[0]


def contract(query_QAD, key_KGD, value_KGD, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, scale=None, cap=None):
    """The contract of variable-length kernels, one segment at a time, with explicit scores."""
    outputs = []
    repeats = query_QAD.size(1) // key_KGD.size(1)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    spans = list(zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True))
    assert max_q == max(q1 - q0 for (q0, q1), _ in spans) and max_k == max(k1 - k0 for _, (k0, k1) in spans)
    assert (len(query_QAD), len(key_KGD)) == (cu_seq_q[-1], cu_seq_k[-1])
    left, right = window_size
    for (q0, q1), (k0, k1) in spans:
        # The last query stands at the last key.
        place_L = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        key_T = torch.arange(k1 - k0)
        visible = (key_T <= place_L + right) & ((left < 0) | (key_T >= place_L - left))
        query = query_QAD[q0:q1].transpose(0, 1)
        key, value = (x[k0:k1].repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (key_KGD, value_KGD))
        scores = query @ key.transpose(-1, -2) * (SIZE**-0.5 if scale is None else scale)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        outputs.append((scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def gpu(monkeypatch):
    """The operator's contract in its place, for tensors on the CPU; counts the calls."""
    calls = []

    def varlen_attn(*args, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (args[0].size(1) != args[1].size(1))
        calls.append(window_size)
        return contract(*args, window_size=window_size, scale=scale)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen_kernels, "_has_flash_attention", lambda query: True)
    monkeypatch.setattr(attention_module, "cpu_kernel_has", lambda *_: False)
    return calls


def assert_same(found: Tensor, expected: Tensor, tensors: list[Tensor]) -> None:
    """Values and gradients to a thousand roundings of float64."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(found, tensors, slope), torch.autograd.grad(expected, tensors, slope), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("window", "scale"), [(None, None), (1, None), (4, 0.3), (70, None)])
def test_one_call_for_a_pack_equals_a_call_a_segment(gpu, monkeypatch, segments, heads, window, scale):
    torch.manual_seed(0)
    tensors = inputs(segments[-1][1], 1, heads, dtype=torch.float64, device="cpu")
    module = attention(window, scale=scale)
    found = module(*tensors, packed_seq_params=layout_of(segments))
    monkeypatch.setattr(varlen_kernels, "_has_flash_attention", lambda query: False)
    assert_same(found, module(*tensors, packed_seq_params=layout_of(segments)), tensors)
    assert len(gpu) == 1


@pytest.mark.parametrize("window", [None, 4])
def test_one_call_for_padded_rows_equals_a_call_a_row(gpu, monkeypatch, window):
    torch.manual_seed(1)
    tensors = inputs(11, 3, (6, 2), dtype=torch.float64, device="cpu")
    module, layout = attention(window), MicrobatchLayout.of_padded_rows(11, 3)
    found = module(*tensors, packed_seq_params=layout)
    monkeypatch.setattr(varlen_kernels, "_has_flash_attention", lambda query: False)
    rows = [module(*(x[:, row : row + 1] for x in tensors), packed_seq_params=layout) for row in range(3)]
    assert_same(found, torch.cat(rows, dim=1), tensors)
    assert len(gpu) == 1


@pytest.mark.parametrize("num_rows", [1, 2])
def test_each_of_two_context_parallel_ranks_makes_one_call_of_its_rows(gpu, num_rows):
    torch.manual_seed(2)
    query, key, value = inputs(24, num_rows, (6, 2), dtype=torch.float64, device="cpu")
    module = attention(5)

    def layout(context=None):
        if num_rows > 1:
            return MicrobatchLayout.of_padded_rows(24, num_rows, context)
        return layout_of([(0, 9, 0, 0), (9, 24, 0, 4)], context)

    class Ranks(ContextShare):
        def gather(self, own):
            both = torch.cat((key, value), dim=-1)
            return torch.cat([both[self._rows_of(rank)] for rank in range(2)])

    expected = module(query, key, value, packed_seq_params=layout())

    for rank in range(2):
        share = Ranks(SimpleNamespace(rank=lambda: rank, size=lambda: 2), 24)  # noqa: B023
        own = share.rows()
        found = module(query[own], key[own], value[own], packed_seq_params=layout(share))
        torch.testing.assert_close(found, expected[own], rtol=1e-12, atol=1e-12)
    assert len(gpu) == 3


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return {"is_causal": is_causal}


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return {"window_size": window_size, "scale": scale}


def of_torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    return {"window_size": window_size, "scale": scale, "enable_gqa": enable_gqa}


def test_the_installed_form_has_the_names_of_the_newest_one_known():
    """The forms above are those of the wheels 2.10.0, 2.11.0, 2.12.0 and 2.14.0; 2.12 to 2.14 have one.

    From 2.14 on torch takes cuDNN where no window is given, which would plan for every pack; causal is a window.
    """
    installed = inspect.signature(varlen.varlen_attn).parameters
    if "enable_gqa" in installed:
        known = inspect.signature(of_torch_2_12).parameters
        assert list(installed)[:7] == list(known)[:7] and {"scale", "window_size", "enable_gqa"} <= set(installed)


@pytest.mark.parametrize(
    ("version", "scores", "expected"),
    [
        (of_torch_2_10, Scores(), {"is_causal": True}),
        (of_torch_2_10, Scores(window=4), None),
        (of_torch_2_10, Scores(scale=0.5), None),
        (of_torch_2_11, Scores(), {"window_size": (-1, 0), "scale": None}),
        (of_torch_2_11, Scores(window=4, scale=0.5), {"window_size": (3, 0), "scale": 0.5}),
        (of_torch_2_12, Scores(window=4), {"window_size": (3, 0), "scale": None, "enable_gqa": True}),
    ],
)
def test_each_version_of_torch_is_asked_by_the_names_it_has(monkeypatch, version, scores, expected):
    monkeypatch.setattr(varlen, "varlen_attn", version)
    query, key, _ = inputs(5, 1, (6, 2))
    kernel = varlen_kernel(query, key, scores)
    assert (kernel and kernel(*range(7))) == expected


def test_without_the_module_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(varlen_kernels, "find_spec", lambda name: None)
    query, key, _ = inputs(5, 1, (6, 2))
    assert varlen_kernel(query, key, Scores()) is None
    assert varlen_kernels.attention_name().startswith("torch, a call a segment")


def test_what_flash_attention_lacks_is_left_to_torchs_other_kernels():
    query, key, _ = inputs(5, 1, (6, 2))
    assert varlen_kernel(query, key, Scores()) is not None
    assert varlen_kernel(query, key, Scores(dropout=0.1)) is None
    assert varlen_kernel(query, key, Scores(softcap=50.0)) is None, "the package flash-attn is not installed"
    assert varlen_kernel(query.float(), key.float(), Scores()) is None
    assert varlen_kernel(torch.empty_like(query, device="cpu"), key, Scores()) is None
    for size, is_served in ((256, True), (264, False), (12, False)):
        wide = [torch.empty(5, 1, heads, size, dtype=torch.bfloat16, device=META) for heads in (6, 2)]
        assert (varlen_kernel(*wide, Scores()) is not None) == is_served


def test_dropout_is_a_layers_own_in_training_alone():
    tensors = inputs(12, 1, (6, 2))
    module = attention(dropout=0.1)
    for is_training in (True, False):
        with Calls() as calls:
            module.train(is_training)(*tensors)
        assert bool(calls.forward) is not is_training


def test_a_soft_cap_is_the_package_flash_attns(monkeypatch):
    asked = []

    def flash_attn_varlen_func(
        *args,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    ):
        asked.append((dropout_p, causal, deterministic))
        return contract(*args, window_size=window_size, scale=softmax_scale, cap=softcap)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(varlen_kernels, "_has_flash_attention", lambda query: True)
    torch.manual_seed(3)
    segments = PACKS["two pairs and padding"]
    tensors = inputs(32, 1, (6, 2), dtype=torch.float64, device="cpu")
    module = attention(4, cap=0.7, scale=0.4)
    found = module(*tensors, packed_seq_params=layout_of(segments))
    assert asked == [(0.0, True, False)]
    monkeypatch.setattr(varlen_kernels, "_has_flash_attention", lambda query: False)
    assert_same(found, module(*tensors, packed_seq_params=layout_of(segments)), tensors)


@pytest.mark.parametrize(
    ("capability", "is_installed", "version", "expected"),
    [
        ((9, 0), True, of_torch_2_11, ["FA3"]),
        ((9, 0), True, of_torch_2_10, []),
        ((9, 0), False, of_torch_2_11, []),
        ((8, 0), True, of_torch_2_11, []),
        ((10, 0), True, of_torch_2_11, []),
    ],
)
def test_flash_attention_3_takes_over_on_hopper_where_it_is_installed_and_cudnn_goes(
    monkeypatch, capability, is_installed, version, expected
):
    torchs = importlib.import_module("torch.nn.attention")
    activated = []
    monkeypatch.setattr(torchs, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(varlen, "varlen_attn", version)
    monkeypatch.setattr(
        varlen_kernels, "find_spec", lambda name: name != "flash_attn_interface" or is_installed or None
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        varlen_kernels.prepare_torch()
        varlen_kernels.prepare_torch()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert varlen_kernels.attention_name() == f"FlashAttention {3 if expected else 2}"
        assert activated == expected
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
