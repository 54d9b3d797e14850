"""Returned tensors of the forward step, which megatron's schedules divide and scale in place."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simpo_megatron.data import BatchOptions, TokenizedPair, collate
from simpo_megatron.loss import SimPOObjective
from simpo_megatron.mcore.forward_step import ForwardStep
from simpo_megatron.mcore.microbatch import Microbatch, to_microbatch


def microbatch_of(num_pairs: int) -> Microbatch:
    ids = np.arange(1, 5, dtype=np.int32)
    pairs = [TokenizedPair(ids[:2], ids[: 1 + pair % 3], ids[1:]) for pair in range(num_pairs)]
    options = BatchOptions(global_batch_size=max(1, num_pairs))
    return to_microbatch(collate(pairs, range(num_pairs), options), torch.device("cpu"))


def forward_step(**objective) -> ForwardStep:
    return ForwardStep(objective=SimPOObjective(**objective), pairs_per_chosen_token=0.25)


def log_probs_for(microbatch: Microbatch) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return -torch.rand(len(microbatch.labels.targets_N), generator=generator) - 0.1


@pytest.mark.parametrize("num_pairs", [1, 3])
@pytest.mark.parametrize("objective", [{}, {"sft_weight": 0.5}, {"loss_type": "hinge"}])
def test_dividing_the_loss_in_place_leaves_every_metric_sum_alone(num_pairs, objective):
    microbatch = microbatch_of(num_pairs)
    log_probs_N = log_probs_for(microbatch).requires_grad_()
    loss, _, sums = forward_step(**objective).loss(log_probs_N * 1.0, microbatch)
    before = {name: float(value) for name, value in sums.items()}
    with torch.no_grad():
        loss.div_(7.0)  # as megatron's schedules do with what the loss function returned
    assert {name: float(value) for name, value in sums.items()} == before
    assert float(loss.detach()) == pytest.approx(before["loss"] / 7.0)


def test_the_loss_can_be_divided_in_place_and_still_differentiated():
    microbatch = microbatch_of(2)
    log_probs_N = log_probs_for(microbatch).requires_grad_()
    loss, _, _ = forward_step().loss(log_probs_N * 1.0, microbatch)
    (expected,) = torch.autograd.grad(loss, log_probs_N, retain_graph=True)
    loss /= 4
    (found,) = torch.autograd.grad(loss, log_probs_N)
    torch.testing.assert_close(found, expected / 4)


def test_sums_carry_no_graph():
    microbatch = microbatch_of(2)
    _, _, sums = forward_step().loss(log_probs_for(microbatch).requires_grad_() * 1.0, microbatch)
    assert not any(value.requires_grad for value in sums.values())


def test_pairs_are_counted_as_megatron_sums_them():
    """The schedules add the counts into an int tensor, which takes no other type in place."""
    microbatch = microbatch_of(3)
    _, num_pairs, _ = forward_step().loss(log_probs_for(microbatch), microbatch)
    total = torch.tensor(0, dtype=torch.int)
    total += num_pairs
    assert (int(total), num_pairs.dtype, num_pairs.dim()) == (3, torch.int, 0)


def test_an_empty_microbatch_adds_nothing_and_has_a_gradient():
    microbatch = microbatch_of(0)
    log_probs_N = log_probs_for(microbatch).requires_grad_()
    assert len(log_probs_N) == 0
    loss, num_pairs, sums = forward_step(sft_weight=0.5).loss(log_probs_N * 1.0, microbatch)
    loss.backward()
    assert (float(loss.detach()), int(num_pairs)) == (0.0, 0)
    assert all(float(value) == 0.0 for value in sums.values())
    assert log_probs_N.grad.shape == (0,)


def test_the_model_gets_the_tokens_positions_labels_and_layout_of_the_next_microbatch():
    seen = []

    def model(tokens_BS, position_ids_BS, attention_mask, labels, packed_seq_params):
        seen.append((tokens_BS, position_ids_BS, attention_mask, labels, packed_seq_params))
        return log_probs_for(first)

    first, second = microbatch_of(2), microbatch_of(1)
    output, loss = forward_step()(iter([first, second]), model)
    assert seen[0][0] is first.tokens_BS and seen[0][1] is first.position_ids_BS
    assert seen[0][2] is None and seen[0][3] is first.labels and seen[0][4] is first.layout
    assert int(loss(output)[1]) == 2


def test_context_parallel_ranks_share_tokens_and_labels_without_overlap():
    """Each token of a response is predicted by one rank, from the row that this rank holds."""
    ids = np.arange(1, 8, dtype=np.int32)
    batch = collate([TokenizedPair(ids[:3], ids, ids[2:])], [0], BatchOptions(global_batch_size=1, sequence_multiple=4))
    here = torch.device("cpu")
    whole = to_microbatch(batch, here)
    found = []
    for rank in range(2):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2)
        own = to_microbatch(batch, here, cp_group=group)
        rows = own.layout.context.rows()
        assert torch.equal(own.tokens_BS, whole.tokens_BS[:, rows]) and own.labels.num_pairs == 1
        found += zip(rows[own.labels.rows_N].tolist(), own.labels.targets_N.tolist(), own.labels.sequence_N.tolist())
    labels = whole.labels
    expected = zip(labels.rows_N.tolist(), labels.targets_N.tolist(), labels.sequence_N.tolist())
    assert sorted(found) == sorted(expected)
