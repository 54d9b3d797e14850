"""Our options as `--simpo-...` arguments of Megatron-LM; where it has an argument of its own, that one counts."""

from __future__ import annotations

import argparse
import typing
from dataclasses import Field, fields

from megatron.core.transformer import TransformerConfig

from simpo_megatron.config.resolving import sequence_multiple
from simpo_megatron.data import BatchOptions, PairOptions
from simpo_megatron.errors import ConfigError
from simpo_megatron.loss import SimPOObjective


def add_simpo_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """`parser` with SimPO's arguments; give it to Megatron-LM as `extra_args_provider`.

    Microbatches differ in length and come from `train_valid_test_datasets_provider`, so `--dataloader-type` is
    external; the loss is a sum over pairs, so `--calculate-per-token-loss` divides it by those of the global batch.
    `--seq-length` is the most tokens of a prompt with one response, a sample is a pair, and nothing is evaluated
    without `--eval-iters`.
    """
    group = parser.add_argument_group("SimPO")
    group.add_argument("--simpo-data", nargs="+", metavar="FILE", help="Preference files; weights and files in turn.")
    group.add_argument("--simpo-valid-data", nargs="+", metavar="FILE", help="Validation files.")
    group.add_argument("--simpo-data-cache", metavar="DIR", default="runs/cache", help="Folder for tokenized pairs.")
    for section in (SimPOObjective, PairOptions):
        _add_fields(group, section)
    # Derived from --seq-length, unless given.
    parser.set_defaults(simpo_max_prompt_length=None)
    parser.set_defaults(dataloader_type="external", calculate_per_token_loss=True, eval_iters=0, eval_interval=1000)
    return parser


def _add_fields(group: argparse._ArgumentGroup, section: type) -> None:
    kinds = typing.get_type_hints(section)
    for entry in _own_fields(section):
        flag, kind = f"--simpo-{entry.name.replace('_', '-')}", kinds[entry.name]
        if kind is bool:
            how: dict[str, typing.Any] = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            how = {"choices": typing.get_args(kind)}
        else:
            # For an optional type, argparse gets the type itself.
            how = {"type": next((part for part in typing.get_args(kind) if part is not type(None)), kind)}
        group.add_argument(flag, default=entry.default, help=entry.metadata["help"].replace("%", "%%"), **how)


def objective_of(args: argparse.Namespace) -> SimPOObjective:
    """The objective of Megatron-LM's parsed arguments.

    Raises: ConfigError for a value outside its range.
    """
    return SimPOObjective(**_given(args, SimPOObjective))


def pair_options(args: argparse.Namespace) -> PairOptions:
    """Options for pairs of at most `--seq-length` tokens.

    Raises: ConfigError for a value outside its range.
    """
    given = _given(args, PairOptions)
    if given["max_prompt_length"] is None:
        given["max_prompt_length"] = args.seq_length * PairOptions.max_prompt_length // PairOptions.max_length
    return PairOptions(max_length=args.seq_length, **given)


def true_vocab_size(args: argparse.Namespace) -> int:
    """Returns the ids of the vocabulary before it is padded for tensor parallelism."""
    from megatron.training import get_tokenizer

    return args.vocab_size or get_tokenizer().vocab_size


def check_pipeline(config: TransformerConfig) -> None:
    """Refuses settings with which megatron's pipeline schedules cannot run microbatches of several lengths.

    Stages then exchange shapes. These settings change the order of the exchange, so that ranks wait for each other in
    a circle, or a shape is paired with the wrong message.

    Raises: ConfigError for batched messages under interleaving, or the flush of warm-up messages.
    """
    interleaves = config.virtual_pipeline_model_parallel_size is not None
    for flag, is_set in (
        ("--no-overlap-p2p-communication", interleaves and config.batch_p2p_comm),
        ("--overlap-p2p-communication-warmup-flush", config.overlap_p2p_comm_warmup_flush),
    ):
        if is_set:
            raise ConfigError(
                f"{flag}: found with pipeline stages, expected without, for microbatches differ in length and ranks "
                "would wait for each other in a circle; leave it out"
            )


def _given(args: argparse.Namespace, section: type) -> dict[str, typing.Any]:
    return {entry.name: getattr(args, f"simpo_{entry.name}") for entry in _own_fields(section)}


def _own_fields(section: type) -> list[Field]:
    """The option fields for which Megatron-LM has no argument."""
    return [entry for entry in fields(section) if entry.init and entry.name != "max_length"]


def batch_options(args: argparse.Namespace) -> BatchOptions:
    """Microbatches of `--micro-batch-size` pairs, each one row in which a pair's prompt stands once.

    Raises: ConfigError when pairs do not divide into such microbatches, or a size that must be 1 is not.
    """
    for size in ("context_parallel_size", "expert_model_parallel_size"):
        if getattr(args, size) != 1:
            flag = f"--{size.replace('_', '-')}"
            raise ConfigError(f"{flag}: found {getattr(args, size)}, expected 1; sequences and experts are not sharded")
    at_once = args.micro_batch_size * args.data_parallel_size
    if args.rampup_batch_size is not None or args.global_batch_size % at_once:
        raise ConfigError(
            f"--global-batch-size: found {args.global_batch_size}, expected a multiple of {at_once} "
            "(--micro-batch-size x data-parallel ranks) and no --rampup-batch-size"
        )
    return BatchOptions(
        global_batch_size=args.global_batch_size,
        packing=False,
        prefix_sharing=True,
        micro_batch_size=args.micro_batch_size,
        sequence_multiple=sequence_multiple(
            fp8_recipe=args.fp8_recipe if args.fp8 else None,
            tensor_shards=args.tensor_model_parallel_size if args.sequence_parallel else 1,
            context_parallel_size=args.context_parallel_size,
        ),
        seed=args.seed,
    )
