"""Batches of pairs: which pairs each step, rank and microbatch holds, and the tensors of one microbatch."""

from simpo_megatron.data.batching.microbatches import PreferenceBatch, collate, round_up
from simpo_megatron.data.batching.padding import Shape, heaviest_step, padding_share, plan_tokens, step_shape
from simpo_megatron.data.batching.step_plans import (
    StepPlan,
    check_batches,
    check_budget,
    iterate_steps,
    pair_tokens,
    plan_evaluation,
    plan_step,
    step_pairs,
)

__all__ = [
    "PreferenceBatch",
    "Shape",
    "StepPlan",
    "check_batches",
    "check_budget",
    "collate",
    "heaviest_step",
    "iterate_steps",
    "padding_share",
    "pair_tokens",
    "plan_evaluation",
    "plan_step",
    "plan_tokens",
    "round_up",
    "step_pairs",
    "step_shape",
]
