"""Checks of the loss on each of three gloo ranks; started by test_loss_parallel.py, one process a rank.

Every function `check_...` is one test: it runs on all ranks, and what it raises goes to a file per rank.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_loss import (
    CUTS,
    GROUPS,
    ROWS,
    SEQUENCE,
    SIZE,
    TARGETS,
    H,
    Shard,
    assert_close,
    dense_log_probs,
    groups,
    make,
    sharded_log_probs,
    values_and_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

from simpo_megatron.errors import DataError
from simpo_megatron.loss import (
    ResponseTokens,
    SimPOObjective,
    VocabShard,
    average_log_probs,
    fused_linear_log_probs,
    preference_loss,
    vocab_parallel_log_probs,
)


def check_gradcheck_from_hidden_states_on_1_2_and_3_ranks():
    hidden, weight, _ = make()
    for _, group in groups():
        for sp in (False, True):
            for budget, cap in ((0, None), (2**20, None), (300, 3.0)):
                options = {"sp": sp, "logits_budget_bytes": budget, "logit_softcap": cap}
                assert torch.autograd.gradcheck(
                    lambda *leaves: sharded_log_probs(*leaves, group, **options),  # noqa: B023
                    (hidden.requires_grad_(), weight.requires_grad_()),
                )


def check_gradcheck_from_logits_on_1_2_and_3_ranks():
    logits = torch.randn(2, 3, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([[0, 7, -100], [15, 12, 6]])
    for size, group in groups():
        start, stop = CUTS[size][group.rank() : group.rank() + 2]
        assert torch.autograd.gradcheck(
            lambda whole: vocab_parallel_log_probs(
                Shard.apply(whole, 2, start, stop, group),  # noqa: B023
                targets,
                tp_group=group,  # noqa: B023
                vocab_start=start,  # noqa: B023
                vocab_size=SIZE,
            ),
            (logits.requires_grad_(),),
        )


def check_first_and_last_ids_of_slices_equal_dense_autograd():
    inputs = make()
    want = values_and_gradients(dense_log_probs, *inputs)
    for _, group in groups():
        got = values_and_gradients(lambda *leaves: sharded_log_probs(*leaves, group), *inputs)  # noqa: B023
        assert_close(got, want)


def check_a_rank_that_owns_no_target_still_gets_its_gradient():
    inputs = make()
    for owner in range(3):
        group, targets = GROUPS[3], torch.full((7,), CUTS[3][owner])
        want = values_and_gradients(lambda *leaves: dense_log_probs(*leaves, targets), *inputs)  # noqa: B023
        got = values_and_gradients(
            lambda *leaves: sharded_log_probs(*leaves, group, targets=targets),  # noqa: B023
            *inputs,
        )
        assert_close(got, want)


def check_a_slice_of_padding_only_takes_no_part():
    inputs = make(padded=20)
    group, cuts = GROUPS[3], [0, 9, 16, 20]
    want = values_and_gradients(dense_log_probs, *inputs)
    assert_close(values_and_gradients(lambda *x: sharded_log_probs(*x, group, cuts=cuts), *inputs), want)


def check_a_slice_of_minus_infinity_has_probability_zero():
    logits = torch.randn(7, 18, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits[:, 7:12] = -torch.inf
    targets = torch.tensor([0, 6, 12, 15, 3, 12, 1])
    start, stop = CUTS[3][dist.get_rank() : dist.get_rank() + 2]
    leaf = logits[:, start:stop].clone().requires_grad_()
    options = {"tp_group": GROUPS[3], "vocab_start": start, "vocab_size": SIZE}
    logp = vocab_parallel_log_probs(leaf, targets, **options)
    logp.sum().backward()
    whole = logits.clone().requires_grad_()
    want = whole[:, :SIZE].log_softmax(-1)[torch.arange(7), targets]
    want.sum().backward()
    assert logp.isfinite().all() and leaf.grad.isfinite().all()
    assert_close((logp.detach(),), (want.detach(),))
    torch.testing.assert_close(leaf.grad, whole.grad[:, start:stop].nan_to_num(0), rtol=1e-13, atol=1e-15)


def check_the_target_itself_at_minus_infinity_gives_minus_infinity():
    logits = torch.zeros(1, 18, dtype=torch.float64)
    logits[0, 7] = -torch.inf
    start, stop = CUTS[3][dist.get_rank() : dist.get_rank() + 2]
    options = {"tp_group": GROUPS[3], "vocab_start": start, "vocab_size": SIZE}
    assert vocab_parallel_log_probs(logits[:, start:stop], torch.tensor([7]), **options) == -torch.inf


def check_all_masked_rows_give_zero_and_join_the_collective():
    targets = torch.full((3, 4), -100)
    start, stop = CUTS[3][dist.get_rank() : dist.get_rank() + 2]
    leaf = torch.randn(3, 4, stop - start).requires_grad_()
    options = {"tp_group": GROUPS[3], "vocab_start": start, "vocab_size": SIZE}
    logp = vocab_parallel_log_probs(leaf, targets, **options)
    logp.sum().backward()
    assert (logp == 0).all() and (leaf.grad == 0).all()


def check_sequence_parallel_equals_replicated():
    inputs = make()
    want = values_and_gradients(dense_log_probs, *inputs)
    for size in (2, 3):
        if dist.get_rank() < size:
            got = values_and_gradients(
                lambda *leaves: sharded_log_probs(*leaves, GROUPS[size], sp=True),  # noqa: B023
                *inputs,
            )
            assert_close(got, want)


def check_sequence_parallel_ranks_without_a_selected_row_take_part():
    hidden, weight, slope = make()
    group, rank = GROUPS[3], dist.get_rank()
    rows = torch.tensor([8, 9, 9, 9, 10, 11, 11])  # all on the last rank
    start, stop = CUTS[3][rank : rank + 2]
    own = hidden[2 * rank : 2 * rank + 2].clone().requires_grad_()
    own_weight = weight[start:stop].clone().requires_grad_()
    logp = fused_linear_log_probs(
        own,
        own_weight,
        ResponseTokens(rows, TARGETS, SEQUENCE, 2),
        vocab=VocabShard(start=start, size=SIZE),
        tp_group=group,
        sequence_parallel=True,
    )
    (logp * slope).sum().backward()
    want = values_and_gradients(lambda h, w: dense_log_probs(h, w, rows=rows), hidden, weight, slope)
    assert_close(
        (logp.detach(), own.grad, own_weight.grad),
        (want[0], want[1][2 * rank : 2 * rank + 2], want[2][start:stop]),
    )


def check_strided_hidden_states_equal_contiguous_ones():
    hidden, weight, slope = make()
    want = values_and_gradients(dense_log_probs, hidden, weight, slope)
    strided = hidden.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    for sp in (False, True):
        own_weight = weight.t().contiguous().t().requires_grad_()
        leaf = strided.detach().requires_grad_()
        logp = sharded_log_probs(leaf, own_weight, GROUPS[3], sp=sp)
        grads = torch.autograd.grad((logp * slope).sum(), (leaf, own_weight))
        assert_close((logp.detach(), *grads), want)


def check_an_id_outside_the_vocabulary_raises_on_every_rank():
    hidden, weight, _ = make()
    for bad in (-1, SIZE, 17, 10**6):
        targets = TARGETS.clone()
        targets[3] = bad
        start, stop = CUTS[3][dist.get_rank() : dist.get_rank() + 2]
        options = {"tp_group": GROUPS[3], "vocab_start": start, "vocab_size": SIZE}
        for function in (
            lambda: sharded_log_probs(hidden, weight, GROUPS[3], targets=targets),  # noqa: B023
            lambda: vocab_parallel_log_probs(torch.zeros(7, stop - start), targets, **options),  # noqa: B023
        ):
            try:
                function()
            except DataError as error:
                assert f"found id {bad}, expected one of a vocabulary of 16" in str(error)
            else:
                raise AssertionError(f"id {bad} passed")


class Collectives(TorchDispatchMode):
    """Lists every collective of the block below it: its name and the bytes of this rank's input."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # Outputs come first, except where they are the inputs.
            name = func.__name__.split(".")[0]
            given = args[0] if name == "allreduce_" else args[1]
            given = given if isinstance(given, list) else [given]
            self.seen.append((name, sum(tensor.nbytes for tensor in given)))
        return func(*args, **(kwargs or {}))


def check_collectives_and_their_bytes():
    hidden, weight, _ = make(dtype=torch.float32)
    group, rank, N = GROUPS[3], dist.get_rank(), len(ROWS)
    start, stop = CUTS[3][rank : rank + 2]
    # Rows 1 3 3 | 5 | 8 9 10 of 0..3 | 4..7 | 8..11; each rank sends its own to all three.
    own = [3, 1, 3][rank]
    merge, row_bytes = ("_allgather_base_", 2 * N * 4), H * 4
    expected = {
        (False, True): ([merge], [("allreduce_", N * row_bytes)]),
        (True, True): ([("alltoall_base_", 3 * own * row_bytes), merge], [("alltoall_base_", N * row_bytes)]),
        (False, False): ([merge], []),
    }
    for (sp, needs_hidden), (forward, backward) in expected.items():
        leaf = (hidden[2 * rank : 2 * rank + 2] if sp else hidden).clone().requires_grad_(needs_hidden)
        leaf_weight = weight[start:stop].clone().requires_grad_()
        with Collectives() as first:
            logp = fused_linear_log_probs(
                leaf,
                leaf_weight,
                ResponseTokens(ROWS, TARGETS, SEQUENCE, 2),
                vocab=VocabShard(start=start, size=SIZE),
                tp_group=group,
                sequence_parallel=sp,
            )
        with Collectives() as second:
            logp.sum().backward()
        assert first.seen == forward, (sp, first.seen, forward)
        assert second.seen == backward, (sp, second.seen, backward)

    logits = torch.zeros(N, stop - start, requires_grad=True)
    options = {"tp_group": group, "vocab_start": start, "vocab_size": SIZE}
    with Collectives() as both:
        vocab_parallel_log_probs(logits, TARGETS, **options).sum().backward()
    assert both.seen == [merge], both.seen


def check_one_rank_uses_no_collective():
    if dist.get_rank() == 0:
        hidden, weight, _ = make()
        with Collectives() as mode:
            values = [
                fused_linear_log_probs(
                    hidden.clone().requires_grad_(),
                    weight,
                    ResponseTokens(ROWS, TARGETS, SEQUENCE, 2),
                    vocab=VocabShard(start=0, size=SIZE),
                    tp_group=group,
                    sequence_parallel=True,
                )
                for group in (GROUPS[1], None)
            ]
            values[0].sum().backward()
        assert mode.seen == [] and torch.equal(*[value.detach() for value in values])


def check_the_whole_objective_is_the_same_number_on_every_rank_and_layout():
    hidden, weight, _ = make(dtype=torch.float32)
    objective = SimPOObjective(beta=2.5, sft_weight=0.2, label_smoothing=0.1)

    def loss_of(logp):
        return preference_loss(*average_log_probs(logp, SEQUENCE, 4), objective=objective).loss

    exact = loss_of(dense_log_probs(hidden.double(), weight.double()))
    for size, group in groups():
        for sp in (False, True):
            loss = loss_of(sharded_log_probs(hidden, weight, group, sp=sp))
            # fp32 dot products of 4, sums of 16 exponentials, averages: a few roundings of 6e-8.
            assert abs(loss.double() - exact) <= 1e-6 * exact.abs()
            losses = [torch.empty_like(loss) for _ in range(size)]
            dist.all_gather(losses, loss, group=group)
            assert all(torch.equal(loss, other) for other in losses)


def check_responses_split_over_context_parallel_ranks_average_as_whole_ones():
    """Averages, counts, loss and gradient of one rank that has every token, from ranks that have some or none."""
    generator = torch.Generator().manual_seed(5)
    whole = -torch.rand(40, generator=generator, dtype=torch.float64)
    sequence = torch.randint(0, 3, (40,), generator=generator)  # of the last response nobody has a token
    objective = SimPOObjective(sft_weight=0.3)
    expected_leaf = whole.clone().requires_grad_()
    expected_avg, expected_counts = average_log_probs(expected_leaf, sequence, 4)
    expected = preference_loss(expected_avg, expected_counts, objective=objective)
    (expected_grad,) = torch.autograd.grad(expected.loss, expected_leaf)
    for dtype, budget in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        for size, group in groups():
            for cuts in ([0, 17, 40, 40], [0, 0, 29, 40]):  # one rank has no token at all
                start, stop = cuts[group.rank()], cuts[group.rank() + 1] if group.rank() < size - 1 else 40
                own = whole[start:stop].to(dtype).requires_grad_()
                avg, counts = average_log_probs(own, sequence[start:stop], 4, group)
                result = preference_loss(avg, counts, objective=objective)
                (grad,) = torch.autograd.grad(result.loss, own)
                assert torch.equal(counts, expected_counts) and counts.dtype == torch.int64
                assert_close((avg, result.loss), (expected_avg, expected.loss), budget)
                assert grad.isfinite().all() and grad.shape == own.shape
                assert_close((grad,), (expected_grad[start:stop],), budget)
                both = [torch.empty_like(result.loss) for _ in range(size)]
                dist.all_gather(both, result.loss.detach(), group=group)
                assert all(torch.equal(both[0], other) for other in both), "the same number on every rank"


def check_inputs_are_bit_equal_afterwards():
    hidden, weight, slope = make(dtype=torch.float32)
    rank = dist.get_rank()
    start, stop = CUTS[3][rank : rank + 2]
    for sp in (False, True):
        own = (hidden[2 * rank : 2 * rank + 2] if sp else hidden).clone().requires_grad_()
        own_weight = weight[start:stop].clone().requires_grad_()
        before = own.detach().clone(), own_weight.detach().clone()
        tokens = ResponseTokens(ROWS.clone(), TARGETS.clone(), SEQUENCE.clone(), 2)
        logp = fused_linear_log_probs(
            own,
            own_weight,
            tokens,
            vocab=VocabShard(start=start, size=SIZE),
            tp_group=GROUPS[3],
            sequence_parallel=sp,
        )
        (logp * slope.float()).sum().backward()
        assert torch.equal(own, before[0]) and torch.equal(own_weight, before[1])
        assert torch.equal(tokens.rows_N, ROWS) and torch.equal(tokens.targets_N, TARGETS)
    logits = torch.randn(7, stop - start)
    copy = logits.clone()
    options = {"tp_group": GROUPS[3], "vocab_start": start, "vocab_size": SIZE}
    vocab_parallel_log_probs(logits.requires_grad_(), TARGETS, **options).sum().backward()
    assert torch.equal(logits, copy)


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for size in (1, 2, 3):
        GROUPS[size] = dist.new_group(range(size))
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
