"""What is known before any process group exists: does the layout fit the ranks, the model and the machine?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpo_megatron.config.presets import PRESETS
from simpo_megatron.config.sections import Config
from simpo_megatron.errors import ConfigError

# Tokens per rank that Transformer Engine's matrix products need a multiple of.
_FP8_TOKEN_MULTIPLE = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
_FP8_COMPUTE_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank finds on its machine."""

    has_cuda: bool = False
    has_transformer_engine: bool = False
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What follows from the configuration and the number of ranks."""

    data_parallel_size: int
    """Ranks that hold different pairs of a step."""
    microbatch_multiple: int
    """Microbatches of a rank and step come in multiples of this."""
    sequence_multiple: int
    """Tokens of a microbatch come in multiples of this."""


def resolve(config: Config, *, world_size: int, model: Mapping[str, Any], machine: Machine) -> Layout:
    """The layout of `config` on `world_size` ranks.

    `model` holds the shape under megatron's names: num_layers, num_attention_heads, num_query_groups (None: as
    many as heads), hidden_size, ffn_hidden_size and, for a mixture, num_moe_experts.

    Raises: ConfigError naming the option, when ranks, model or machine cannot serve it.
    """
    _check_inputs_are_named(config)
    data_parallel_size = _data_parallel_size(config, world_size)
    _check_model(config, model, data_parallel_size)
    _check_fp8(config, model, machine)
    layout = Layout(
        data_parallel_size=data_parallel_size,
        microbatch_multiple=_microbatch_multiple(config),
        sequence_multiple=_sequence_multiple(config),
    )
    fewest = layout.data_parallel_size * layout.microbatch_multiple
    if config.batch.global_batch_size < fewest:
        raise ConfigError(
            f"global_batch_size: found {config.batch.global_batch_size}, expected at least {fewest}, one pair for each of "
            f"{data_parallel_size} data-parallel ranks x {layout.microbatch_multiple} microbatches"
        )
    if config.batch.packing and config.batch.tokens_per_microbatch % layout.sequence_multiple:
        raise ConfigError(
            f"tokens_per_microbatch: found {config.batch.tokens_per_microbatch}, expected a multiple of "
            f"{layout.sequence_multiple}, which sequence parallelism, context parallelism and FP8 need together"
        )
    return layout


def _check_inputs_are_named(config: Config) -> None:
    if config.model.model is None:
        preset = config.run.preset
        published = f" (the preset's runs: {PRESETS[preset].summary})" if preset else ""
        raise ConfigError(f"model: not given, expected a Hugging Face folder{published}; add --model DIR")
    if not config.data.data:
        raise ConfigError("data: not given, expected preference files; add --data FILE")


def _data_parallel_size(config: Config, world_size: int) -> int:
    sizes = config.parallel.sizes
    product = f"tp {sizes.tensor} x pp {sizes.pipeline} x cp {sizes.context} = {sizes.model}"
    if world_size % sizes.model:
        raise ConfigError(
            f"tensor_model_parallel_size: {world_size} ranks cannot be divided by {product}; "
            f"start a multiple of {sizes.model}, as with torchrun --nproc-per-node {sizes.model}"
        )
    # Experts keep the tensor-parallel split of the dense layers, on the ranks of data and context parallelism.
    if (world_size // sizes.pipeline // sizes.tensor) % sizes.expert:
        raise ConfigError(
            f"expert_model_parallel_size: found {sizes.expert}, expected a divisor of the "
            f"{world_size // sizes.pipeline // sizes.tensor} ranks beside tensor and pipeline parallelism"
        )
    return world_size // sizes.model


def _check_model(config: Config, model: Mapping[str, Any], data_parallel_size: int) -> None:
    sizes = config.parallel.sizes
    heads = model["num_attention_heads"]
    groups = model.get("num_query_groups") or heads
    experts = model.get("num_moe_experts")
    chunks = sizes.pipeline * (sizes.virtual_pipeline or 1)
    if heads % sizes.tensor:
        _refuse(
            "tensor_model_parallel_size", sizes.tensor, f"a divisor of the model's {heads} attention heads"
        )
    if groups % sizes.tensor and sizes.tensor % groups:
        _refuse(
            "tensor_model_parallel_size",
            sizes.tensor,
            f"a divisor or multiple of the model's {groups} key/value groups",
        )
    if model["ffn_hidden_size"] % sizes.tensor:
        _refuse(
            "tensor_model_parallel_size",
            sizes.tensor,
            f"a divisor of the model's MLP width {model['ffn_hidden_size']}",
        )
    if model["num_layers"] % chunks:
        key = (
            "virtual_pipeline_model_parallel_size"
            if sizes.virtual_pipeline
            else "pipeline_model_parallel_size"
        )
        _refuse(
            key,
            sizes.virtual_pipeline or sizes.pipeline,
            f"pp x vpp (here {chunks}) to divide the model's {model['num_layers']} layers",
        )
    if sizes.expert > 1 and (not experts or experts % sizes.expert):
        _refuse(
            "expert_model_parallel_size",
            sizes.expert,
            f"a divisor of the model's {experts or 'absent'} experts",
        )


def _check_fp8(config: Config, model: Mapping[str, Any], machine: Machine) -> None:
    recipe = config.precision.fp8_recipe
    if recipe is None:
        return
    if not machine.has_cuda:
        _refuse(
            "fp8_recipe",
            recipe,
            "a CUDA device, and none is there; leave out --fp8 to train in bf16 or --fp32",
        )
    if not machine.has_transformer_engine:
        # megatron-core alone accepts the recipe and computes in full precision without a word.
        _refuse(
            "fp8_recipe",
            recipe,
            "Transformer Engine, which is not installed: pip install 'simpo-megatron[te]'",
        )
    needed, found = _FP8_COMPUTE_CAPABILITY[recipe], machine.compute_capability
    if found is not None and found < needed:
        _refuse(
            "fp8_recipe", recipe, f"compute capability {needed[0]}.{needed[1]}, found {found[0]}.{found[1]}"
        )
    multiple = 128 if recipe == "blockwise" else 16
    tensor = config.parallel.tensor_model_parallel_size
    for name, width in (
        ("hidden size", model["hidden_size"]),
        ("MLP width", model["ffn_hidden_size"] // tensor),
    ):
        if width % multiple:
            _refuse(
                "fp8_recipe", recipe, f"the model's {name} per rank ({width}) to be a multiple of {multiple}"
            )


def _microbatch_multiple(config: Config) -> int:
    """megatron's interleaved schedule runs microbatches in rounds of one per stage."""
    parallel = config.parallel
    return (
        parallel.pipeline_model_parallel_size
        if (parallel.virtual_pipeline_model_parallel_size or 1) > 1
        else 1
    )


def _sequence_multiple(config: Config) -> int:
    """A rank's share of the tokens must suit its matrix products after context and sequence parallelism cut it."""
    parallel = config.parallel
    per_rank = _FP8_TOKEN_MULTIPLE.get(config.precision.fp8_recipe or "", 1)
    # Causal context parallelism gives each rank one early and one late piece of the sequence.
    context = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    sequence = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return math.prod((per_rank, context, sequence))


def _refuse(key: str, found: object, expected: str) -> None:
    raise ConfigError(f"{key}: found {found}, expected {expected}")
