"""Launches of the experts of an MoE layer, counted on the meta device: together, and one by one."""

from __future__ import annotations

import torch
from counting import Counter
from counts import check_counts
from megatron.core.transformer.moe.experts import SequentialMLP
from tiny_experts import experts_of

from simpo_megatron import parallel
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.mcore.layers import GroupedExperts

# A layer of Qwen3-30B-A3B, and 4,096 tokens.
EXPERTS, HIDDEN, WIDTH, CHOSEN, TOKENS = 128, 2048, 768, 8, 4096


def launches(kind: type) -> tuple[int, int]:
    """(forward, forward and backward)."""
    with torch.device("meta"):
        experts = experts_of(kind, EXPERTS, hidden=HIDDEN, width=WIDTH, dtype=torch.bfloat16).to("meta")
    rows = torch.empty(TOKENS * CHOSEN, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    probs = torch.empty(TOKENS * CHOSEN, device="meta", requires_grad=True)
    with Counter() as forward:
        output, _ = experts(rows, torch.full((EXPERTS,), TOKENS * CHOSEN // EXPERTS), probs)
    with Counter() as backward:
        output.backward(torch.empty_like(output))
    return len(forward.operations), len(forward.operations) + len(backward.operations)


def test_experts_together_launch_what_one_does_and_a_product_for_each_weight_gradient():
    cpu_patches.install()
    with parallel.alone():
        parallel.seed_everything(0)
        one_by_one, together = launches(SequentialMLP), launches(GroupedExperts)
    print(f"{EXPERTS} experts: launches (forward, both ways) one by one {one_by_one}, together {together}")
    check_counts(f"launches of {EXPERTS} experts", {"forward": together[0], "both ways": together[1]})
    assert one_by_one[0] >= 5 * EXPERTS and one_by_one[1] >= 12 * EXPERTS
