"""Bytes and launches of the loss on a GPU, counted by operation on the meta device at real shapes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from counting import Counter, Operation
from counts import check_counts

from simpo_megatron.loss import ResponseTokens, VocabShard, fused_linear_log_probs
from simpo_megatron.loss.block_plan import COLUMN_MULTIPLE, BlockPlan
from simpo_megatron.loss.fused_linear import DEFAULT_GPU_LOGITS_BUDGET_BYTES
from simpo_megatron.loss.products import has_wide_products

pytest.importorskip("triton", reason="Triton is not installed; make test-gpu-cpu has it")


META = torch.device("meta")
V = 128256
# Response rows, rows of the pack, hidden size, this rank's slice of the vocabulary.
SHAPES = {
    "70B tp8": (8192, 16384, 8192, V // 8),
    "8B tp1": (4096, 8192, 4096, V),
    "8B tp4": (4096, 8192, 4096, V // 4),
    "1B tp1": (4096, 8192, 2048, V),
}
# An H100 as the model of reference knows it: bf16 products, and memory at 85 % of its nominal bandwidth.
FLOPS, BANDWIDTH = 700e12, 0.85 * 3.35e12


def counted(rows: int, length: int, hidden_size: int, width: int, **options) -> list[Operation]:
    hidden = torch.empty(length, 1, hidden_size, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight = torch.nn.Parameter(torch.empty(width, hidden_size, dtype=torch.bfloat16, device=META))
    weight.main_grad = torch.empty(width, hidden_size, device=META)
    weight.grad_added_to_main_grad = False
    generator = torch.Generator().manual_seed(0)
    cpu = (
        torch.randperm(length, generator=generator)[:rows].sort().values,
        torch.randint(width, (rows,), generator=generator),
        torch.zeros(rows, dtype=torch.long),
    )
    tokens = ResponseTokens(*cpu, 1).with_copy(*(torch.empty_like(x, device=META) for x in cpu))
    has_wide_products()  # asks torch by trying, once
    with Counter() as counter:
        logp = fused_linear_log_probs(
            hidden,
            weight,
            tokens,
            vocab=VocabShard(start=0, size=width),
            tp_group=None,
            accumulate_into_main_grad=True,
            **options,
        )
        logp.backward(torch.empty_like(logp))
    return counter.operations


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_is_three_products_and_two_passes_over_the_logits(name):
    rows, _, hidden_size, width = shape = SHAPES[name]
    operations = counted(*shape)
    assert "row_stats" in {operation.name for operation in operations}, "the Triton backend computes"
    check_counts("launches of the loss", {name: len(operations)})
    products = sum(operation.flops for operation in operations)
    floor = 3 * 2 * rows * width * hidden_size
    assert products == floor
    elementwise = [operation for operation in operations if not operation.flops]
    passes = sum(o.num_bytes for o in elementwise if o.name in {"row_stats", "slopes"})
    # One read in the forward, one read and one write in the backward, of two bytes a logit.
    assert passes <= 1.01 * 6 * rows * width
    # All the rest is of the size of hidden states.
    assert all(o.largest[-1] in (hidden_size, rows, 1) for o in elementwise if o.name not in {"row_stats", "slopes"})
    seconds = products / FLOPS + sum(operation.num_bytes for operation in elementwise) / BANDWIDTH
    # At 1B the two passes alone are 0.12.
    assert seconds <= 1.13 * floor / FLOPS, f"{seconds * FLOPS / floor:.3f} of the three products"


@pytest.mark.parametrize("logit_bytes", [2, 4])
@pytest.mark.parametrize("rows", [1, 300, 4096, 8192, 60_000])
@pytest.mark.parametrize("width", [1, 255, 16032, 50257, V, 151936, 256_000])
def test_blocks_start_at_whole_tiles_and_stay_within_the_budget(width, rows, logit_bytes):
    budget = DEFAULT_GPU_LOGITS_BUDGET_BYTES
    plan = BlockPlan.of(rows, width, logit_bytes=logit_bytes, slope_bytes=2, budget_bytes=budget)
    assert [stop for _, stop in plan.blocks] == [start for start, _ in plan.blocks[1:]] + [width]
    assert plan.blocks[0][0] == 0 and all(start < stop for start, stop in plan.blocks)
    sizes = [stop - start for start, stop in plan.blocks]
    assert all(size == sizes[0] and size % COLUMN_MULTIPLE == 0 for size, _ in pairwise(sizes))
    recomputes = plan.num_kept < len(plan.blocks)
    kept = sum(sizes[: plan.num_kept]) * logit_bytes
    in_work = sizes[0] * (2 + (logit_bytes if recomputes and logit_bytes != 2 else 0))
    assert rows * (kept + in_work) <= budget
    assert len(plan.blocks) <= 8 or recomputes


def test_a_slice_without_columns_and_a_microbatch_without_rows_have_no_block():
    for rows, width in ((0, 100), (100, 0)):
        assert BlockPlan.of(rows, width, logit_bytes=2, slope_bytes=2, budget_bytes=10**9) == BlockPlan((), 0)
