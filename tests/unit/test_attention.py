"""Attention over packs with shared prompts is attention over separate sequences, alone and in megatron's
model.

Attention is compared in float64, where 1e-12 is a thousand roundings. The model is compared in float64
too, but for the rotary frequencies, which megatron holds in fp32 and which are the same numbers on both
sides.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from twin import response_log_probs

from simpo_megatron import parallel
from simpo_megatron.config import config_from
from simpo_megatron.data import BatchOptions, TokenizedPair, collate
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.mcore.attention.segmented_attention import SegmentedAttention
from simpo_megatron.mcore.microbatch import MicrobatchLayout, Segment

# First and last rows: a segment of one token, prefixes of none, one and many tokens, one token behind a long
# prefix, two segments with the same prefix, and a padding tail.
PACKS = {
    "no prefix": [(0, 7, 0, 0), (7, 8, 0, 0), (8, 21, 0, 0)],
    "prefix of one token": [(0, 5, 0, 0), (5, 11, 0, 1), (11, 14, 0, 0), (14, 15, 11, 12)],
    "long prefix": [(0, 40, 0, 0), (40, 41, 0, 33), (41, 60, 0, 33)],
    "two pairs and padding": [(0, 9, 0, 0), (9, 17, 0, 4), (17, 25, 0, 0), (25, 28, 17, 22), (28, 32, 0, 0)],
}
HEADS = {"as many groups as heads": (4, 4), "grouped": (6, 2), "one group": (3, 1)}


def attention(
    window: int | None = None, cap: float | None = None, sinks: torch.Tensor | None = None
) -> SegmentedAttention:
    config = SimpleNamespace(
        softmax_type="vanilla" if sinks is None else "learnable",
        num_attention_heads=0 if sinks is None else len(sinks),
        params_dtype=torch.float64,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
        attn_logit_softcapping=cap,
        qk_layernorm=False,
    )
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    module = SegmentedAttention(config, 1, None, "self", pg_collection=groups)
    if sinks is not None:
        module.softmax_offset = sinks
    return module


def layout_of(segments) -> MicrobatchLayout:
    length = segments[-1][1]
    return MicrobatchLayout.of_pack(torch.arange(length), tuple(Segment(*s) for s in segments))


def dense_attention(query, key, value, segments, window=None, cap=None, sinks=None) -> torch.Tensor:
    """The definition, one query at a time: softmax over the last `window` of its prefix and segment up to itself.

    A sink takes part in the softmax, and its value is zero.
    """
    length, _, num_heads, size = query.shape
    heads_per_group = num_heads // key.shape[2]
    rows = []
    for start, end, prefix_start, prefix_end in segments:
        for position in range(start, end):
            seen = [*range(prefix_start, prefix_end), *range(start, position + 1)][-(window or length) :]
            for head in range(num_heads):
                group = head // heads_per_group
                scores = key[seen, 0, group] @ query[position, 0, head] / size**0.5
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                scores = scores if sinks is None else torch.cat((scores, sinks[head, None]))
                rows.append(torch.softmax(scores, dim=0)[: len(seen)] @ value[seen, 0, group])
    return torch.stack(rows).view(length, 1, -1)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (1, None), (4, None), (52, None), (None, 0.7), (4, 0.7)])
def test_a_pack_attends_as_its_definition_says(segments, heads, window, cap):
    torch.manual_seed(1)
    num_heads, num_groups = heads
    length = segments[-1][1]
    inputs = [
        torch.randn(length, 1, number, 5, dtype=torch.float64, requires_grad=True)
        for number in (num_heads, num_groups, num_groups)
    ]
    cotangent = torch.randn(length, 1, num_heads * 5, dtype=torch.float64)
    found = attention(window, cap)(*inputs, packed_seq_params=layout_of(segments))
    expected = dense_attention(*inputs, segments, window, cap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found_grads = torch.autograd.grad((found * cotangent).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for name, one, other in zip("qkv", found_grads, expected_grads, strict=True):
        assert float((one - other).abs().max()) <= 1e-12, name


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("window", "with_sinks", "size"), [(None, True, 5), (4, True, 3), (None, False, 3)])
def test_sinks_and_values_smaller_than_keys_attend_as_their_definition_says(heads, window, with_sinks, size):
    torch.manual_seed(1)
    segments = PACKS["two pairs and padding"]
    num_heads, num_groups = heads
    shapes = (num_heads, 5), (num_groups, 5), (num_groups, size)
    inputs = [torch.randn(32, 1, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sinks = torch.nn.Parameter(torch.randn(num_heads, dtype=torch.float64)) if with_sinks else None
    found = attention(window, sinks=sinks)(*inputs, packed_seq_params=layout_of(segments))
    expected = dense_attention(*inputs, segments, window, sinks=sinks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent, learned = torch.randn_like(expected), [*inputs, *([] if sinks is None else [sinks])]
    grads = [torch.autograd.grad((out * cotangent).sum(), learned) for out in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_padded_rows_attend_each_by_itself(window):
    torch.manual_seed(2)
    inputs = [torch.randn(6, 3, number, 5, dtype=torch.float64) for number in (4, 2, 2)]
    found = attention(window)(*inputs, packed_seq_params=MicrobatchLayout.of_padded_rows(6))
    for row in range(3):
        expected = dense_attention(*(x[:, row : row + 1] for x in inputs), [(0, 6, 0, 0)], window)
        torch.testing.assert_close(found[:, row : row + 1], expected, rtol=1e-12, atol=1e-12)


def test_nobody_sees_another_pair_or_the_padding():
    segments = PACKS["two pairs and padding"]
    inputs = [torch.randn(32, 1, 4, 5) for _ in range(3)]
    before = attention()(*inputs, packed_seq_params=layout_of(segments))
    for tensor in inputs:
        tensor[17:] = torch.nan
    after = attention()(*inputs, packed_seq_params=layout_of(segments))
    assert torch.equal(before[:17], after[:17])


def test_every_layer_of_a_microbatch_uses_the_same_mask():
    layout = layout_of(PACKS["long prefix"])
    segment = layout.segments[2]
    here = torch.device("cpu")
    assert layout.mask(segment, 5, here) is layout.mask(segment, 5, here)
    assert layout.mask(segment, None, here) is layout.mask(segment, 52, here)
    assert layout.mask(layout.segments[0], 40, here) is None


TINY = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma2": {"sliding_window": 9, "head_dim": 16, "query_pre_attn_scalar": 12, "tie_word_embeddings": True}
    | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    # Without the load-balancing loss, whose gradient is a whole microbatch's.
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0},
}


@pytest.fixture(scope="module")
def groups():
    cpu_patches.install()
    with parallel.alone() as groups:
        yield groups


@pytest.fixture(scope="module", params=FAMILIES)
def gpt(request, groups, tmp_path_factory):
    """(megatron's model, transformers' model with the same weights, its description), float64, grouped heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from simpo_megatron.convert import load_hf_weights
    from simpo_megatron.mcore.families import describe_hf_model
    from simpo_megatron.mcore.model import build_model

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    # Eager, because fused kernels have no soft cap and grouped experts no float64.
    twin = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(request.param, **TINY | FAMILIES[request.param]),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    twin.save_pretrained(folder)
    config = config_from(model=str(folder), data=("none",), bf16=False)
    parallel.seed_everything(0)
    description = describe_hf_model(folder)
    (model,) = build_model(description, config, groups)
    load_hf_weights([model], folder, description, tp_rank=0, tp_size=1)
    return model.double(), twin.double(), description


def ragged_pairs() -> list[TokenizedPair]:
    """A prompt of one token, a long one, and responses of one token among them."""
    random = np.random.default_rng(5)
    shapes = [(1, 5, 3), (29, 1, 8), (7, 12, 1), (13, 9, 9)]
    return [TokenizedPair(*(random.integers(1, 131, n).astype(np.int32) for n in shape)) for shape in shapes]


def log_probs_of(model, pairs, **options) -> torch.Tensor:
    """Log-probs of all response tokens in the order of pairs, chosen and rejected, tokens."""
    from simpo_megatron.mcore.microbatch import output_of, to_microbatch

    batch = collate(pairs, range(len(pairs)), BatchOptions(global_batch_size=len(pairs), **options))
    microbatch = to_microbatch(batch, torch.device("cpu"))
    log_probs_N = output_of(model, microbatch)
    return log_probs_N[torch.argsort(batch.sequence_N, stable=True)]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(sequence_multiple=16),
        dict(prefix_sharing=False),
        dict(packing=False),
        dict(packing=False, prefix_sharing=False),
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()) or "packed and shared",
)
def test_the_model_gives_separate_sequences_log_probs_and_gradients(gpt, options, tmp_path):
    model, twin, description = gpt
    pairs = ragged_pairs()
    found = log_probs_of(model, pairs, **options)
    expected = torch.cat(
        [
            response_log_probs(twin, pair.prompt_ids.tolist(), response.tolist())
            for pair in pairs
            for response in (pair.chosen_ids, pair.rejected_ids)
        ]
    )
    # Both hold rotary frequencies in fp32, by different formulas: 1e-7 of an angle of 40.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)

    weights_N = torch.randn(len(found), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    names, parameters = zip(*model.named_parameters(), strict=True)
    packed = torch.autograd.grad((found.double() * weights_N).sum(), parameters)
    # One response at a time through the same model: what packing and sharing alone change.
    alone = torch.cat([separate_log_probs(model, pair) for pair in pairs])
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)
    separate = torch.autograd.grad((alone.double() * weights_N).sum(), parameters)
    # megatron's routers take their softmax in fp32.
    exact = 1e-7 if description.family == "mixtral" else 1e-9
    for name, one, other in zip(names, packed, separate, strict=True):
        assert float((one - other).norm() / other.norm()) <= exact, name

    twin.zero_grad()
    (expected * weights_N).sum().backward()
    of_twin = saved_gradients(twin, tmp_path)
    found_grads = by_hf_names(model, packed, description)
    assert found_grads.keys() == of_twin.keys()
    for name, other in of_twin.items():
        assert float((found_grads[name] - other).norm() / other.norm()) <= 1e-5, name


def saved_gradients(twin, folder) -> dict[str, torch.Tensor]:
    """transformers' gradients under the names that its parameters have in a file."""
    weights = [parameter.data for parameter in twin.parameters()]
    for parameter in twin.parameters():
        parameter.data = parameter.grad
    twin.save_pretrained(folder)
    for parameter, weight in zip(twin.parameters(), weights, strict=True):
        parameter.data = weight
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def by_hf_names(model, gradients, description) -> dict[str, torch.Tensor]:
    """The gradients under the names and in the order of transformers' parameters."""
    from simpo_megatron.convert.mapping import pieces
    from simpo_megatron.convert.weight_layouts import ALONE

    weights = [parameter.clone() for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.copy_(gradient)
    found = {}
    for piece in pieces(model, description, tp=ALONE):
        rows = piece.view.reshape(piece.hf_shape)[: 131 if piece.layout.is_vocabulary else None].clone()
        found[piece.hf_name] = torch.cat((found[piece.hf_name], rows)) if piece.hf_name in found else rows
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)
    return found


def separate_log_probs(model, pair: TokenizedPair) -> torch.Tensor:
    """Log-probs from the logits of one plain causal row for each response."""
    parts = []
    for response in (pair.chosen_ids, pair.rejected_ids):
        ids = torch.tensor([[*pair.prompt_ids.tolist(), *response.tolist()]])
        logits = model(ids, torch.arange(ids.shape[1])[None], None)[0, :, :131]
        rows = torch.log_softmax(logits, dim=-1)[len(pair.prompt_ids) - 1 : -1]
        parts.append(rows.gather(1, ids[0, len(pair.prompt_ids) :, None])[:, 0])
    return torch.cat(parts)
