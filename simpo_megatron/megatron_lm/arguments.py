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

    Microbatches come from `train_valid_test_datasets_provider`, so `--dataloader-type` is external; the loss is a sum
    over pairs, so `--calculate-per-token-loss` divides it by those of the global batch. A sample is a pair, and nothing
    is evaluated without `--eval-iters`. With pipeline stages a microbatch has `--seq-length` tokens for each of its
    pairs, as Megatron-LM's messages between stages have; see `batch_options`.
    """
    group = parser.add_argument_group("SimPO")
    group.add_argument("--simpo-data", nargs="+", metavar="FILE", help="Preference files; weights and files in turn.")
    group.add_argument("--simpo-valid-data", nargs="+", metavar="FILE", help="Validation files.")
    group.add_argument("--simpo-data-cache", metavar="DIR", default="runs/cache", help="Folder for tokenized pairs.")
    for section in (SimPOObjective, PairOptions):
        _add_fields(group, section)
    # Derived from --seq-length, unless given.
    parser.set_defaults(simpo_max_length=None, simpo_max_prompt_length=None)
    parser.set_defaults(dataloader_type="external", calculate_per_token_loss=True, eval_iters=0, eval_interval=1000)
    return parser


def _add_fields(group: argparse._ArgumentGroup, section: type) -> None:
    kinds = typing.get_type_hints(section)
    for entry in _options(section):
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
    """Options for pairs of at most `--simpo-max-length` tokens of a prompt with one response, or else `--seq-length`.

    Raises: ConfigError for a value outside its range.
    """
    given = _given(args, PairOptions)
    if given["max_length"] is None:
        given["max_length"] = args.seq_length
    if given["max_prompt_length"] is None:
        given["max_prompt_length"] = given["max_length"] * PairOptions.max_prompt_length // PairOptions.max_length
    return PairOptions(**given)


def true_vocab_size(args: argparse.Namespace) -> int:
    """Returns the ids of the vocabulary before it is padded for tensor parallelism."""
    from megatron.training import get_tokenizer

    return args.vocab_size or get_tokenizer().vocab_size


def check_pipeline(config: TransformerConfig) -> None:
    """Refuses settings with which messages between pipeline stages may cross or wait for each other in a circle.

    Raises: ConfigError for batched messages under interleaving, or the flush of warm-up messages.
    """
    interleaves = config.virtual_pipeline_model_parallel_size is not None
    for flag, is_set in (
        ("--no-overlap-p2p-communication", interleaves and config.batch_p2p_comm),
        ("--overlap-p2p-communication-warmup-flush", config.overlap_p2p_comm_warmup_flush),
    ):
        if is_set:
            raise ConfigError(
                f"{flag}: found with pipeline stages, expected without, for ranks would wait for each other in a "
                "circle or take a message for another; leave it out"
            )


def check_precision(config: TransformerConfig, *, transformer_engine: bool) -> None:
    """Refuses Transformer Engine in fp32, where up to 2.9 at least it has no attention for a row of several sequences.

    Raises: ConfigError without `--bf16` and `--fp16`.
    """
    if transformer_engine and not (config.bf16 or config.fp16):
        raise ConfigError(
            "--transformer-impl: found transformer_engine in fp32, in which it has no attention for rows of several "
            "sequences, expected local, or --bf16"
        )


def check_experts(config: TransformerConfig) -> None:
    """Refuses losses of an MoE's routers that would get a wrong weight, and experts divided over ranks.

    Gradients are divided by pairs where megatron expects tokens. Our router accounts for it in the load-balancing loss
    of a microbatch alone.

    Raises: ConfigError for a z-loss, a load-balancing loss of another kind, or tensor parallelism of experts.
    """
    if config.num_moe_experts is None:
        return
    if config.expert_tensor_parallel_size != 1:
        raise ConfigError(
            f"--expert-tensor-parallel-size: found {config.expert_tensor_parallel_size}, which Megatron-LM takes from "
            "--tensor-model-parallel-size, expected 1; give it, experts are whole on each rank"
        )
    kinds = config.moe_router_load_balancing_type
    others = {kinds} if isinstance(kinds, str) else set(kinds)
    others -= {"aux_loss", "none"}
    if others:
        raise ConfigError(
            f"--moe-router-load-balancing-type: found {', '.join(sorted(others))}, expected aux_loss or none, for a "
            "row holds many sequences and its gradients are divided by pairs"
        )
    if config.moe_z_loss_coeff is not None:
        raise ConfigError(
            f"--moe-z-loss-coeff: found {config.moe_z_loss_coeff}, expected none, for it is weighed by tokens and "
            "gradients are divided by pairs; leave it out"
        )


def rows_have_one_length(args: argparse.Namespace) -> bool:
    """True where every microbatch is padded to `--seq-length` x `--micro-batch-size` tokens.

    Megatron-LM's schedules tell pipeline stages this length for all steps, and its buffers of tensor-parallel overlap
    are made for it.
    """
    return args.pipeline_model_parallel_size > 1 or args.tp_comm_overlap


def num_microbatches(args: argparse.Namespace) -> int:
    """Microbatches of a step on each data-parallel rank."""
    return args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)


def _given(args: argparse.Namespace, section: type) -> dict[str, typing.Any]:
    return {entry.name: getattr(args, f"simpo_{entry.name}") for entry in _options(section)}


def _options(section: type) -> list[Field]:
    return [entry for entry in fields(section) if entry.init]


def batch_options(args: argparse.Namespace) -> BatchOptions:
    """Microbatches of one row each, in which a pair's prompt stands once.

    They have `--micro-batch-size` pairs of like length. Where `rows_have_one_length`, they have as many on average,
    chosen so that rows are about equally full.

    Raises: ConfigError when pairs do not divide into such microbatches, or a size has another value than it must have.
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
    for size in ("global_batch_size", "micro_batch_size"):
        # Megatron-LM has sizes of its own for validation from 0.19 on.
        found, expected = getattr(args, f"eval_{size}", None), getattr(args, size)
        if found not in (None, expected):
            flag = f"--eval-{size.replace('_', '-')}"
            raise ConfigError(f"{flag}: found {found}, expected {expected}, as in training; leave it out")
    multiple = sequence_multiple(
        fp8_recipe=args.fp8_recipe if args.fp8 else None,
        tensor_shards=args.tensor_model_parallel_size if args.sequence_parallel else 1,
        context_parallel_size=args.context_parallel_size,
    )
    rows: dict[str, typing.Any] = {"packing": False}
    if rows_have_one_length(args):
        if args.seq_length % multiple:
            raise ConfigError(
                f"--seq-length: found {args.seq_length}, expected a multiple of {multiple}, to which "
                "sequence parallelism and FP8 pad rows; make it one"
            )
        rows = {"packing": True, "tokens_per_microbatch": args.seq_length * args.micro_batch_size}
        rows |= {"fixed_pack_length": True, "one_shape_per_step": True}
    return BatchOptions(
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        prefix_sharing=True,
        sequence_multiple=multiple,
        seed=args.seed,
        **rows,
    )
