"""Endless iterators over microbatches in place of Megatron-LM's datasets; each step has our trainer's pairs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from simpo_megatron.data import (
    BatchOptions,
    PreferenceBatch,
    PreferenceDataset,
    build_preference_dataset,
    check_batches,
    check_vocabulary,
    collate,
    plan_step,
)
from simpo_megatron.errors import ConfigError
from simpo_megatron.megatron_lm.arguments import batch_options, pair_options, true_vocab_size
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
    from megatron.training import get_args

    args = get_args()
    if not args.simpo_data:
        raise ConfigError("--simpo-data: found none, expected preference files")
    if bool(args.simpo_valid_data) != bool(args.eval_iters):
        raise ConfigError(
            f"--eval-iters: found {args.eval_iters}, expected validation steps with --simpo-valid-data and 0 without"
        )
    options = batch_options(args)

    def endless(files: list[str], consumed_pairs: int) -> Iterator[Sample]:
        dataset = _dataset(files, args)
        check_batches(dataset.lengths, options, dp_size=args.data_parallel_size)
        return _samples(
            dataset,
            options,
            dp_rank=data_parallel_rank(),
            dp_size=args.data_parallel_size,
            consumed_pairs=consumed_pairs,
        )

    train = endless(args.simpo_data, args.consumed_train_samples)
    valid = endless(args.simpo_valid_data, args.consumed_valid_samples) if args.simpo_valid_data else None
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


def _samples(
    dataset: PreferenceDataset, options: BatchOptions, *, dp_rank: int, dp_size: int, consumed_pairs: int
) -> Iterator[Sample]:
    while True:
        plan = plan_step(dataset.lengths, consumed_pairs, options, dp_size=dp_size)
        step = [pair for rank in plan for microbatch in rank for pair in microbatch]
        pairs_per_chosen_token = len(step) / int(dataset.counted[step, 0].sum())
        for microbatch in plan[dp_rank]:
            batch = collate([dataset[pair] for pair in microbatch], microbatch, options)
            yield Sample(batch, pairs_per_chosen_token)
        consumed_pairs += len(step)
