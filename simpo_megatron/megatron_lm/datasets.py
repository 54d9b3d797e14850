"""Endless iterators over microbatches in place of Megatron-LM's datasets; each step has our trainer's pairs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from simpo_megatron.data import (
    BatchOptions,
    PreferenceBatch,
    PreferenceDataset,
    StepPlan,
    build_preference_dataset,
    check_batches,
    check_vocabulary,
    collate,
    padding_share,
    plan_step,
    plan_tokens,
    step_shape,
)
from simpo_megatron.data.batching import round_up
from simpo_megatron.errors import ConfigError
from simpo_megatron.megatron_lm.arguments import batch_options, num_microbatches, pair_options, true_vocab_size
from simpo_megatron.parallel import data_parallel_rank
from simpo_megatron.ranks import build_on_first_ranks


@dataclass(frozen=True)
class Sample:
    """One microbatch on the CPU, as Megatron-LM's iterator hands it to `forward_step`."""

    batch: PreferenceBatch
    pairs_per_chosen_token: float
    """Pairs over chosen response tokens of the whole global batch; the weight of a token in the `token` SFT term."""


def train_valid_test_datasets_provider(
    train_valid_test_num_samples: object, vp_stage: int | None = None
) -> tuple[Iterator[Sample], Iterator[Sample] | None, None]:
    """Endless iterators over training pairs from the first one not yet consumed, over validation pairs, and None.

    Every rank reads for itself (`is_distributed`), and each virtual pipeline stage has its own iterators. Files are
    tokenised once on each node. Collectives: those of `build_on_first_ranks` for each set of files.

    Raises: ConfigError, DataError: a mistake in arguments or files, on every rank alike.
    """
    from megatron.training import get_args, print_rank_0

    args = get_args()
    if not args.simpo_data:
        raise ConfigError("--simpo-data: found none, expected preference files")
    if bool(args.simpo_valid_data) != bool(args.eval_iters):
        raise ConfigError(
            f"--eval-iters: found {args.eval_iters}, expected validation steps with --simpo-valid-data and 0 without"
        )
    division = Division(batch_options(args), dp_size=args.data_parallel_size, num_microbatches=num_microbatches(args))

    def endless(name: str, files: list[str], consumed_pairs: int, num_steps: int) -> Iterator[Sample]:
        dataset = _dataset(files, args)
        division.check(dataset.lengths, consumed_pairs, num_steps)
        if division.options.fixed_pack_length:
            print_rank_0(f"{name} rows: {division.described(dataset.lengths)}")
        return _samples(dataset, division, dp_rank=data_parallel_rank(), consumed_pairs=consumed_pairs)

    num_left = args.train_iters - args.consumed_train_samples // args.global_batch_size
    train = endless("training", args.simpo_data, args.consumed_train_samples, num_left)
    if not args.simpo_valid_data:
        return train, None, None
    # One evaluation each `eval_interval` steps and one at the end.
    num_evaluations = args.train_iters // args.eval_interval + 1
    valid = endless("validation", args.simpo_valid_data, args.consumed_valid_samples, num_evaluations * args.eval_iters)
    return train, valid, None


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron-LM's mark


def _dataset(files: list[str], args: argparse.Namespace) -> PreferenceDataset:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_model, trust_remote_code=False)
    pairs = pair_options(args)

    dataset = build_on_first_ranks(
        lambda build: build_preference_dataset(files, tokenizer, pairs, args.simpo_data_cache, build=build)
    )
    check_vocabulary(dataset, true_vocab_size(args))
    return dataset


@dataclass(frozen=True)
class Division:
    """The rule by which pairs of a step become microbatches, as many on each rank as Megatron-LM asks for."""

    options: BatchOptions
    dp_size: int
    num_microbatches: int
    """Microbatches of each data-parallel rank."""

    def plan(self, lengths: np.ndarray, consumed_pairs: int) -> StepPlan:
        """The pairs of each rank's microbatches, for the step after the first `consumed_pairs` pairs."""
        return plan_step(
            lengths, consumed_pairs, self.options, dp_size=self.dp_size, microbatch_multiple=self.num_microbatches
        )

    def check(self, lengths: np.ndarray, consumed_pairs: int, num_steps: int) -> None:
        """Refuses pairs that do not fill microbatches, or rows of the next `num_steps` steps that do not fit.

        A rank would find a row too long in the middle of a step, while other stages wait for its output.

        Raises: ConfigError, on every rank alike.
        """
        fixed, unbound = self.options, self
        if fixed.fixed_pack_length:
            # Each row is then as long as its pairs are, and no step is cut into more rows.
            own_lengths = replace(fixed, fixed_pack_length=False, tokens_per_microbatch=2**40, sequence_multiple=1)
            unbound = replace(self, options=own_lengths)
        check_batches(lengths, unbound.options, dp_size=self.dp_size, microbatch_multiple=self.num_microbatches)
        if not fixed.fixed_pack_length:
            return
        steps = range(consumed_pairs, consumed_pairs + num_steps * fixed.global_batch_size, fixed.global_batch_size)
        tokens = (plan_tokens(lengths, unbound.plan(lengths, consumed), unbound.options) for consumed in steps)
        longest = max((max(map(max, of_step)) for of_step in tokens), default=0)
        if longest > fixed.tokens_per_microbatch:
            at_once = fixed.micro_batch_size
            raise ConfigError(
                f"--seq-length: found {fixed.tokens_per_microbatch // at_once} x --micro-batch-size {at_once} = "
                f"{fixed.tokens_per_microbatch} tokens of a microbatch, expected at least {longest}, which the longest "
                f"one of {num_steps} steps has; raise it to "
                f"{round_up(-(-longest // at_once), fixed.sequence_multiple)}, or lower --simpo-max-length"
            )

    def described(self, lengths: np.ndarray) -> str:
        """A line on rows of one length, with the share of padding in the first steps."""
        share = padding_share(lengths, self.options, dp_size=self.dp_size, microbatch_multiple=self.num_microbatches)
        return f"{self.options.tokens_per_microbatch:,} tokens each, {share:.0%} of them padding"


def _samples(dataset: PreferenceDataset, division: Division, *, dp_rank: int, consumed_pairs: int) -> Iterator[Sample]:
    while True:
        plan = division.plan(dataset.lengths, consumed_pairs)
        step = [pair for rank in plan for microbatch in rank for pair in microbatch]
        pairs_per_chosen_token = len(step) / int(dataset.counted[step, 0].sum())
        shape = step_shape(dataset.lengths, plan, division.options)
        for microbatch in plan[dp_rank]:
            batch = collate([dataset[pair] for pair in microbatch], microbatch, division.options, shape)
            yield Sample(batch, pairs_per_chosen_token)
        consumed_pairs += len(step)
