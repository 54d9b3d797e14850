"""Batches: plans are exact and balanced; every response token sees its prompt and its past, nothing else."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_megatron.data import (
    BatchOptions,
    TokenizedPair,
    check_batches,
    check_budget,
    collate,
    heaviest_step,
    plan_evaluation,
    plan_step,
)
from simpo_megatron.data.batching import pair_tokens, plan_tokens, step_pairs, step_shape
from simpo_megatron.data.batching.padding import microbatch_shape
from simpo_megatron.errors import ConfigError

MODES = list(product((True, False), (True, False)))


def some_lengths(num_pairs, seed=0, longest=300):
    return np.random.default_rng(seed).integers(1, longest, (num_pairs, 3)).astype(np.int32)


def some_pairs(num_pairs, seed=0, longest=9):
    """Pairs whose token ids are all different, so that an id tells where it came from; some have tokens of context."""
    pairs, next_id = [], 1
    rng = np.random.default_rng(seed)
    for lengths in some_lengths(num_pairs, seed, longest):
        parts = np.split(np.arange(next_id, next_id + lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:2])
        next_id += int(lengths.sum())
        masks = [None if rng.random() < 0.5 else rng.random(length) < 0.5 for length in lengths[1:]]
        for mask in masks:
            if mask is not None:
                mask[-1] = True
        pairs.append(TokenizedPair(*parts, *masks))
    return pairs


def visible_context(batch, row):
    """Returns the token ids and their positions that the query at flat row sees, itself included."""
    num_rows = batch.tokens_BS.shape[0]
    position, line = divmod(row, num_rows)
    if batch.segments_G4 is None:
        keys = range(position + 1)
    else:
        [segment] = [s for s in batch.segments_G4.tolist() if s[0] <= position < s[1]]
        keys = [*range(segment[2], segment[3]), *range(segment[0], position + 1)]
    return (
        [int(batch.tokens_BS[line, k]) for k in keys],
        [int(batch.position_ids_BS[line, k]) for k in keys],
    )


@pytest.mark.parametrize(("packing", "sharing"), MODES)
@pytest.mark.parametrize(("num_pairs", "multiple"), [(1, 1), (3, 1), (3, 16), (7, 5)])
def test_every_response_token_sees_its_prompt_and_its_past_only(packing, sharing, num_pairs, multiple):
    options = BatchOptions(
        packing=packing,
        prefix_sharing=sharing,
        sequence_multiple=multiple,
        pad_id=0,
        tokens_per_microbatch=80 * multiple,
    )
    pairs = some_pairs(num_pairs)
    batch = collate(pairs, [10 + i for i in range(num_pairs)], options)
    assert batch.pair_ids_P.tolist() == [10 + i for i in range(num_pairs)]
    assert batch.num_pairs == num_pairs
    assert batch.tokens_BS.shape[1] % multiple == 0
    rows = batch.rows_N.tolist()
    assert rows == sorted(rows)
    responses = [response for pair in pairs for response in pair.responses]
    counted = [range(len(ids)) if mask is None else np.flatnonzero(mask).tolist() for ids, mask in responses]
    counts = [0] * (2 * num_pairs)
    for row, target, sequence in zip(rows, batch.targets_N.tolist(), batch.sequence_N.tolist(), strict=True):
        pair = pairs[sequence // 2]
        response = (pair.chosen_ids, pair.rejected_ids)[sequence % 2].tolist()
        number = counted[sequence][counts[sequence]]
        counts[sequence] += 1
        expected = pair.prompt_ids.tolist() + response[:number]
        assert visible_context(batch, row) == (expected, list(range(len(expected))))
        assert target == response[number]
    assert counts == [len(places) for places in counted]


@pytest.mark.parametrize(("packing", "sharing"), MODES)
def test_segments_tile_the_row_and_padding_is_the_last_one(packing, sharing):
    modes = {"packing": packing, "prefix_sharing": sharing}
    options = BatchOptions(**modes, sequence_multiple=64, tokens_per_microbatch=640, pad_id=7)
    pairs = some_pairs(4)
    pairs = [TokenizedPair(p.prompt_ids + 7, p.chosen_ids + 7, p.rejected_ids + 7, p.chosen_mask) for p in pairs]
    batch = collate(pairs, range(4), options)
    lengths = np.array([[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs])
    assert batch.num_tokens == pair_tokens(lengths, options).sum()
    for tensor in (batch.tokens_BS, batch.position_ids_BS, batch.rows_N, batch.targets_N, batch.sequence_N):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    if batch.segments_G4 is None:
        assert not packing and not sharing
        assert batch.tokens_BS.shape[0] == 8
        assert (batch.position_ids_BS[batch.tokens_BS == 7] == 0).all()
        assert (batch.position_ids_BS > 0).sum() == batch.num_tokens - 8
        return
    assert batch.tokens_BS.shape[0] == 1
    assert batch.segments_G4.dtype == torch.int32
    ends = [0]
    for start, end, prefix_start, prefix_end in batch.segments_G4.tolist():
        assert start == ends[-1] < end
        assert prefix_start <= prefix_end <= start
        ends.append(end)
    assert ends[-1] == batch.tokens_BS.shape[1]
    assert (batch.tokens_BS[0, batch.num_tokens :] == 7).all()
    assert ends[-2] == batch.num_tokens < ends[-1]
    has_prefix = [end > start for _, _, start, end in batch.segments_G4.tolist()]
    assert has_prefix == [False, sharing] * 4 + [False]


@pytest.mark.parametrize(("packing", "sharing"), MODES)
def test_a_microbatch_without_pairs_is_one_segment_of_padding(packing, sharing):
    options = BatchOptions(packing=packing, prefix_sharing=sharing, sequence_multiple=8, pad_id=3)
    batch = collate([], [], options)
    assert (batch.num_pairs, batch.num_tokens) == (0, 0)
    assert batch.tokens_BS.tolist() == [[3] * 8]
    assert batch.segments_G4.tolist() == [[0, 8, 0, 0]]
    assert len(batch.rows_N) == len(batch.targets_N) == len(batch.sequence_N) == 0
    assert batch.rows_N.dtype == batch.pair_ids_P.dtype == torch.int64


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 40),
    dp_size=st.integers(1, 4),
    multiple=st.integers(1, 3),
    mode=st.sampled_from(MODES),
    align=st.sampled_from([1, 2, 16]),
    step=st.integers(0, 9),
)
def test_a_step_is_exactly_the_global_batch_on_every_layout(seed, batch, dp_size, multiple, mode, align, step):
    lengths = some_lengths(batch + seed % 50, seed)
    options = BatchOptions(
        global_batch_size=batch, packing=mode[0], prefix_sharing=mode[1], tokens_per_microbatch=1600,
        micro_batch_size=3, sequence_multiple=align, seed=seed,
    )  # fmt: skip
    plan = plan_step(lengths, step * batch, options, dp_size=dp_size, microbatch_multiple=multiple)
    assert len(plan) == dp_size
    assert len({len(microbatches) for microbatches in plan}) == 1
    assert len(plan[0]) % multiple == 0
    microbatches = [m for rank in plan for m in rank]
    indices = sorted(i for m in microbatches for i in m)
    assert indices == sorted(step_pairs(len(lengths), step * batch, options).tolist())
    assert len(indices) == batch
    tokens = pair_tokens(lengths, options)
    if options.packing:
        assert all(tokens[list(m)].sum() <= 1600 for m in microbatches)
    else:
        assert all(len(m) <= 3 for m in microbatches)
    if batch >= len(microbatches):
        assert all(microbatches)


def test_the_order_of_pairs_depends_on_seed_epoch_and_consumption_only():
    lengths = some_lengths(50)
    orders = {}
    for batch in (5, 8, 20):
        options = BatchOptions(global_batch_size=batch, tokens_per_microbatch=4096)
        seen = [step_pairs(50, start, options) for start in range(0, 200, batch)]
        orders[batch] = np.concatenate(seen).tolist()
    assert orders[5] == orders[8] == orders[20]
    first, second = orders[5][:50], orders[5][50:100]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    assert step_pairs(50, 0, BatchOptions(global_batch_size=50, seed=7)).tolist() != first
    wide = BatchOptions(global_batch_size=20, tokens_per_microbatch=4096)
    across = [i for rank in plan_step(lengths, 40, wide, dp_size=2) for m in rank for i in m]
    assert sorted(across) == sorted(orders[20][40:60])  # ten of one epoch, ten of the next


def test_the_order_never_changes_between_versions():
    two_epochs = step_pairs(10, 0, BatchOptions(global_batch_size=20, seed=42)).tolist()
    assert two_epochs == [4, 3, 2, 0, 5, 6, 1, 8, 7, 9, 8, 7, 5, 1, 9, 4, 0, 3, 2, 6]


@pytest.mark.parametrize("one_shape", [False, True])
@pytest.mark.parametrize(("packing", "sharing"), MODES)
def test_the_heaviest_step_holds_the_largest_batch_of_all_that_are_collated(packing, sharing, one_shape):
    pairs = some_pairs(50, seed=3)
    lengths = np.array([[len(ids) for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs])
    modes = dict(packing=packing, prefix_sharing=sharing, tokens_per_microbatch=64, micro_batch_size=2)
    options = BatchOptions(global_batch_size=12, sequence_multiple=2, one_shape_per_step=one_shape, **modes)
    sizes = {}
    for number in range(9):
        plan = plan_step(lengths, 7 + 12 * number, options, dp_size=2)
        shape = step_shape(lengths, plan, options)
        for rank, planned in zip(plan, plan_tokens(lengths, plan, options), strict=True):
            batches = [collate([pairs[i] for i in microbatch], microbatch, options, shape) for microbatch in rank]
            assert planned == [batch.tokens_BS.numel() for batch in batches]
            sizes.setdefault(number, []).extend((b.tokens_BS.numel(), len(b.rows_N)) for b in batches)
    number, plan = heaviest_step(lengths, 7, options, num_steps=9, dp_size=2)
    assert max(sizes[number]) == max(max(several) for several in sizes.values())
    assert len({max(several) for several in sizes.values()}) > 1, "steps differ, so that finding one means something"
    firsts = tuple(rank[:1] for rank in plan)
    assert step_shape(lengths, firsts, options) == step_shape(lengths, plan, options)
    assert max(max(tokens) for tokens in plan_tokens(lengths, firsts, options)) == max(sizes[number])[0]
    for rank, whole in zip(plan, plan_step(lengths, 7 + 12 * number, options, dp_size=2), strict=True):
        assert sorted(rank) == sorted(whole)
        own = [microbatch_shape(lengths[list(microbatch)], options).num_tokens for microbatch in rank]
        assert own == sorted(own, reverse=True)


@pytest.mark.parametrize(("packing", "sharing"), MODES)
@pytest.mark.parametrize("fixed", [False, True])
def test_all_microbatches_of_a_step_have_one_shape_and_padding_is_counted_nowhere(packing, sharing, fixed):
    if fixed and not packing:
        pytest.skip("only packs have a longest length that is given")
    pairs = some_pairs(13, seed=5)
    lengths = np.array([[len(ids) for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs])
    common = dict(packing=packing, prefix_sharing=sharing, tokens_per_microbatch=72, micro_batch_size=2, pad_id=1)
    plain = BatchOptions(global_batch_size=13, sequence_multiple=4, **common)
    options = dataclasses.replace(plain, one_shape_per_step=True, fixed_pack_length=fixed)
    plan = plan_step(lengths, 0, options, dp_size=2, microbatch_multiple=3)
    assert step_shape(lengths, plan, plain) is None
    shape = step_shape(lengths, plan, options)
    longest = max(microbatch_shape(lengths[list(mb)], options).width for rank in plan for mb in rank)
    assert shape.width == (72 if fixed else longest)
    for microbatch in [mb for rank in plan for mb in rank] + [()]:
        chosen = [pairs[i] for i in microbatch]
        padded, bare = collate(chosen, microbatch, options, shape), collate(chosen, microbatch, plain)
        assert padded.tokens_BS.shape == shape
        assert padded.num_tokens == bare.num_tokens == pair_tokens(lengths[list(microbatch)], options).sum()
        for name in ("targets_N", "sequence_N"):
            by_sequence = [(getattr(b, name)[torch.argsort(b.sequence_N, stable=True)]) for b in (padded, bare)]
            assert torch.equal(*by_sequence)
        for row in padded.rows_N.tolist():
            seen, _ = visible_context(padded, row)
            assert 0 < len(seen) < 40, "no response token sees padding"
        if packing or sharing:
            assert padded.segments_G4[-1, 1] == shape.width
            ends_of_pairs = bare.num_tokens
            assert padded.segments_G4[-1].tolist() == [ends_of_pairs, shape.width, 0, 0] or shape.width == ends_of_pairs


def test_a_fixed_length_is_that_of_packs():
    with pytest.raises(ConfigError, match="fixed_pack_length: found True, expected packing with it"):
        BatchOptions(packing=False, fixed_pack_length=True)


def test_packs_are_balanced():
    lengths = some_lengths(128, 3)
    options = BatchOptions(global_batch_size=128, tokens_per_microbatch=8192)
    plan = plan_step(lengths, 0, options, dp_size=4)
    loads = np.array([[pair_tokens(lengths, options)[list(m)].sum() for m in rank] for rank in plan])
    assert loads.max() / loads.mean() < 1.03
    assert loads.sum(axis=1).max() / loads.sum(axis=1).mean() < 1.01


def test_padded_rows_are_grouped_by_length():
    lengths = np.array([[1, 100, 100], [1, 5, 5], [1, 99, 99], [1, 4, 4]], np.int32)
    options = BatchOptions(global_batch_size=4, packing=False, prefix_sharing=False, micro_batch_size=2)
    [microbatches] = plan_step(lengths, 0, options, dp_size=1)
    assert sorted(map(sorted, microbatches)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(("packing", "sharing"), MODES)
@pytest.mark.parametrize(("num_pairs", "dp_size", "multiple"), [(1, 2, 1), (10, 3, 2), (64, 4, 1), (65, 2, 4)])
def test_an_evaluation_holds_every_pair_once_in_plans_every_rank_can_follow(
    packing, sharing, num_pairs, dp_size, multiple
):
    options = BatchOptions(global_batch_size=16, packing=packing, prefix_sharing=sharing, tokens_per_microbatch=1600)
    plans = plan_evaluation(some_lengths(num_pairs), options, dp_size=dp_size, microbatch_multiple=multiple)
    seen = []
    for number, plan in enumerate(plans):
        assert len({len(rank) for rank in plan}) == 1
        assert len(plan[0]) % multiple == 0
        indices = sorted(i for rank in plan for m in rank for i in m)
        assert indices == list(range(16 * number, min(16 * number + 16, num_pairs)))
        seen += indices
    assert seen == list(range(num_pairs))


def test_what_cannot_be_planned_is_said_at_start_with_the_arithmetic():
    lengths = some_lengths(20)
    with pytest.raises(ConfigError, match="global_batch_size: found 128, expected at most 20, the pairs of the data"):
        check_batches(lengths, BatchOptions(), dp_size=1)
    with pytest.raises(
        ConfigError,
        match="found 4, expected at least 8: one pair for each of 2 data-parallel ranks x 4 microbatches",
    ):
        check_batches(lengths, BatchOptions(global_batch_size=4), dp_size=2, microbatch_multiple=4)
    longest = int(pair_tokens(lengths, BatchOptions()).argmax())
    options = BatchOptions(global_batch_size=4, tokens_per_microbatch=64, sequence_multiple=16)
    with pytest.raises(ConfigError, match=f"pair {longest} takes .* raise it to [0-9]+"):
        check_batches(lengths, options, dp_size=1)
    check_budget(lengths, BatchOptions(packing=False, tokens_per_microbatch=1))
    for wrong in (
        {"global_batch_size": 0},
        {"micro_batch_size": 0},
        {"tokens_per_microbatch": 100, "sequence_multiple": 16},
        {"pad_id": -1},
    ):
        with pytest.raises(ConfigError):
            BatchOptions(**wrong)
