"""The shape of a microbatch, from the lengths of its pairs, and the common shape of all microbatches of a step.

Pipeline stages that know the shapes they will receive need no exchange of shapes. Every rank computes them from the
plan, which has the pairs of all ranks.
"""

from typing import NamedTuple

import numpy as np

from simpo_megatron.data.batch_options import BatchOptions
from simpo_megatron.data.batching.microbatches import round_up
from simpo_megatron.data.batching.step_plans import MicrobatchPairs, StepPlan, pair_tokens, plan_step


class Shape(NamedTuple):
    """Rows of a microbatch, and tokens of each of them, padding included."""

    num_rows: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.width


def microbatch_shape(lengths: np.ndarray, options: BatchOptions) -> Shape:
    """Returns the smallest shape that holds pairs with these lengths [num_pairs, 3]."""
    if options.packing or options.prefix_sharing or not len(lengths):
        return Shape(1, round_up(max(1, int(pair_tokens(lengths, options).sum())), options.sequence_multiple))
    longest = int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())
    return Shape(2 * len(lengths), round_up(longest, options.sequence_multiple))


def step_shape(lengths: np.ndarray, plan: StepPlan, options: BatchOptions) -> Shape | None:
    """Returns the shape of every microbatch of `plan`; None where each has its own.

    It is `tokens_per_microbatch` with `fixed_pack_length`, else the smallest that holds the largest one of any rank.
    """
    if options.fixed_pack_length:
        return Shape(1, options.tokens_per_microbatch)
    if not options.one_shape_per_step:
        return None
    shapes = [microbatch_shape(lengths[list(microbatch)], options) for rank in plan for microbatch in rank]
    return Shape(max(shape.num_rows for shape in shapes), max(shape.width for shape in shapes))


def plan_tokens(lengths: np.ndarray, plan: StepPlan, options: BatchOptions) -> list[list[int]]:
    """Returns the tokens, padding included, of each rank's microbatches."""
    shape = step_shape(lengths, plan, options)
    return [
        [(shape or microbatch_shape(lengths[list(microbatch)], options)).num_tokens for microbatch in rank]
        for rank in plan
    ]


def padding_share(lengths: np.ndarray, options: BatchOptions, *, dp_size: int, microbatch_multiple: int = 1) -> float:
    """Returns the share of padding among the tokens of an epoch's steps, of the first 100 where there are more."""
    real = padded = 0
    for number in range(min(100, max(1, len(lengths) // options.global_batch_size))):
        consumed = number * options.global_batch_size
        plan = plan_step(lengths, consumed, options, dp_size=dp_size, microbatch_multiple=microbatch_multiple)
        padded += sum(map(sum, plan_tokens(lengths, plan, options)))
        real += int(pair_tokens(lengths[[i for rank in plan for mb in rank for i in mb]], options).sum())
    return 1 - real / padded


def heaviest_step(
    lengths: np.ndarray,
    consumed_pairs: int,
    options: BatchOptions,
    *,
    num_steps: int,
    dp_size: int,
    microbatch_multiple: int = 1,
) -> tuple[int, StepPlan]:
    """Returns (its number from 0, its plan) of the one of the next `num_steps` steps with the largest microbatch.

    In this plan each rank's largest microbatches come first, by their tokens before padding to the common shape. The
    largest step has the most tokens, padding included; of several, the most response tokens.
    """

    def plan(number: int) -> StepPlan:
        consumed = consumed_pairs + number * options.global_batch_size
        return plan_step(lengths, consumed, options, dp_size=dp_size, microbatch_multiple=microbatch_multiple)

    def response_tokens(microbatch: MicrobatchPairs) -> int:
        return int(lengths[list(microbatch), 1:].sum())

    def own_size(microbatch: MicrobatchPairs) -> tuple[int, int]:
        return microbatch_shape(lengths[list(microbatch)], options).num_tokens, response_tokens(microbatch)

    def largest(number: int) -> tuple[int, int]:
        ranks = plan(number)
        tokens = plan_tokens(lengths, ranks, options)
        return max(
            (size, response_tokens(microbatch))
            for of_rank, rank in zip(tokens, ranks, strict=True)
            for size, microbatch in zip(of_rank, rank, strict=True)
        )

    number = max(range(num_steps), key=largest)
    return number, tuple(tuple(sorted(rank, key=own_size, reverse=True)) for rank in plan(number))
