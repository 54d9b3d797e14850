"""Checks of the layout against ranks, model and machine, before any process group exists."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from simpo_megatron.config.fp8_checks import FP8_MULTIPLE, check_fp8, check_fp8_recompute, check_fp8_weights
from simpo_megatron.config.machine import Machine
from simpo_megatron.config.presets import PRESETS
from simpo_megatron.config.sections import Config
from simpo_megatron.data import BatchOptions, check_global_batch_size
from simpo_megatron.errors import ConfigError, DataError, Refusals, require

# Widths of padded rows under Transformer Engine are rounded up to this: cuDNN builds a plan for each new width.
PLANNED_WIDTH_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The values that follow from the configuration and the number of ranks."""

    data_parallel_size: int
    """Ranks that hold different pairs of a step."""
    microbatch_multiple: int
    """Microbatches of a rank and step come in multiples of this."""
    sequence_multiple: int
    """Tokens of a microbatch come in multiples of this."""
    one_shape_per_step: bool = False
    """All microbatches of a step are padded to one shape, so that pipeline stages need not ask for it."""


def resolve(config: Config, *, world_size: int, model: Mapping[str, Any], machine: Machine) -> Layout:
    """The layout of `config` on `world_size` ranks.

    `model` holds the shape under megatron's names: num_layers, num_attention_heads, num_query_groups (None:
    as many as heads), hidden_size, ffn_hidden_size and, for an MoE, num_moe_experts and
    moe_ffn_hidden_size.

    Raises: ConfigError naming the options that ranks, model or machine cannot serve.
    """
    return _resolved(config, world_size, model, machine)


def check_layout(config: Config, *, world_size: int, model: Mapping[str, Any]) -> None:
    """Raises ConfigError as `resolve`, for all that does not depend on the machine, which takes torch to know."""
    _resolved(config, world_size, model, None)


def _resolved(config: Config, world_size: int, model: Mapping[str, Any], machine: Machine | None) -> Layout:
    _check_inputs_are_named(config)
    refusals = Refusals()
    for check in (
        lambda: _check_ranks(config, world_size),
        lambda: _check_tensor_parallelism(config, model),
        lambda: _check_stages(config, model),
        lambda: _check_experts(config, model),
        lambda: _check_exports(config),
        lambda: _check_lora(config, model),
        lambda: check_fp8_recompute(config),
        lambda: check_fp8_weights(config, model),
        *_checks_of_machine(config, world_size, model, machine),
    ):
        with refusals.collected():
            check()
    refusals.raise_any()
    sizes = config.parallel.sizes
    multiple = sequence_multiple(
        fp8_recipe=config.precision.fp8_recipe,
        tensor_shards=sizes.tensor if config.parallel.sequence_parallel else 1,
        context_parallel_size=sizes.context,
    )
    rows_are_padded = not config.batch.packing and not config.batch.prefix_sharing
    if rows_are_padded and machine is not None and machine.has_cuda and machine.has_transformer_engine:
        multiple = math.lcm(multiple, PLANNED_WIDTH_MULTIPLE)
    layout = Layout(
        data_parallel_size=world_size // sizes.model,
        microbatch_multiple=_microbatch_multiple(config),
        sequence_multiple=multiple,
        one_shape_per_step=sizes.pipeline > 1,
    )
    _check_batches(config, layout)
    return layout


def _checks_of_machine(
    config: Config, world_size: int, model: Mapping[str, Any], machine: Machine | None
) -> tuple[Callable[[], None], ...]:
    if machine is None:
        return ()
    return (
        lambda: check_fp8(config, model, machine),
        lambda: _check_tp_comm_overlap(config, model, machine),
        lambda: _check_profiling(config, world_size, machine),
    )


def num_train_iters(config: Config, num_pairs: int) -> int:
    """Optimizer steps of the run: `train_iters`, or as many whole global batches as `epochs` passes hold, the fewer.

    Raises:
        ConfigError: the warm-up is no shorter than warm-up and decay together.
        DataError: the pairs do not fill one global batch.
    """
    epochs, num_steps = config.optimizer.epochs, config.optimizer.train_iters
    if epochs is not None:
        of_epochs = epochs * num_pairs // config.batch.global_batch_size
        if of_epochs == 0:
            raise DataError(
                f"global_batch_size: found {config.batch.global_batch_size}, expected at most "
                f"{epochs * num_pairs}, the pairs of {epochs} epoch(s); lower it or raise epochs"
            )
        num_steps = of_epochs if num_steps is None else min(num_steps, of_epochs)
    assert num_steps is not None, "without train_iters there is one epoch"
    schedule_steps(config, num_steps)
    return num_steps


def steps_between_evaluations(config: Config, num_pairs: int) -> int | None:
    """Steps from one evaluation to the next; None when there are none in between.

    A part of an epoch is whole steps of the global batches that an epoch fills, as Lightning counts it.
    """
    run = config.run
    if run.eval_epochs is None:
        return run.eval_interval
    return max(1, int(run.eval_epochs * (num_pairs // config.batch.global_batch_size)))


def schedule_steps(config: Config, train_iters: int) -> tuple[int, int]:
    """(steps of the warm-up, steps of warm-up and decay together) in a run of `train_iters` steps.

    Raises:
        ConfigError: nothing is left for the decay.
    """
    settings = config.optimizer
    decay = settings.lr_decay_iters or train_iters
    if settings.lr_warmup_iters is None:
        return min(math.ceil(settings.lr_warmup_fraction * decay), decay - 1), decay
    require(
        settings.lr_warmup_iters < decay,
        "lr_warmup_iters",
        settings.lr_warmup_iters,
        f"fewer than the {decay} steps of warm-up and decay together; lower it, or set lr_decay_iters",
    )
    return settings.lr_warmup_iters, decay


def _check_inputs_are_named(config: Config) -> None:
    if config.model.model is None:
        preset = config.run.preset
        published = f" (the preset's runs: {PRESETS[preset].summary})" if preset else ""
        raise ConfigError(f"model: found none, expected a Hugging Face folder{published}; add --model DIR")
    if not config.data.data:
        raise ConfigError("data: found none, expected preference files; add --data FILE")


def _check_ranks(config: Config, world_size: int) -> None:
    sizes = config.parallel.sizes
    if world_size % sizes.model:
        raise ConfigError(
            f"tensor_model_parallel_size: found {world_size} ranks, expected a multiple of tp {sizes.tensor} x "
            f"pp {sizes.pipeline} x cp {sizes.context} = {sizes.model}; start as many, as with "
            f"torchrun --nproc-per-node {sizes.model}"
        )
    # Experts are never sharded: all ranks of a stage share them, tensor-parallel ones like the others.
    of_stage = world_size // sizes.pipeline
    require(
        of_stage % sizes.expert == 0,
        "expert_model_parallel_size",
        sizes.expert,
        f"a divisor of the {of_stage} ranks of a pipeline stage",
    )


def _check_tensor_parallelism(config: Config, model: Mapping[str, Any]) -> None:
    heads, width = model["num_attention_heads"], model["ffn_hidden_size"]
    groups = model.get("num_query_groups") or heads
    tp_key, tp = "tensor_model_parallel_size", config.parallel.tensor_model_parallel_size
    require(heads % tp == 0, tp_key, tp, f"a divisor of the model's {heads} attention heads")
    require(
        groups % tp == 0 or tp % groups == 0,
        tp_key,
        tp,
        f"a divisor or a multiple of the model's {groups} key/value groups",
    )
    rows = (heads + 2 * groups) * model.get("kv_channels", tp)
    require(groups >= tp or rows % tp == 0, tp_key, tp, f"a divisor of the {rows} rows of query, key and value")
    # In an MoE, layers without experts and experts that all tokens pass are divided as well; others are whole.
    has_mlp = not model.get("num_moe_experts") or 0 in (model.get("moe_layer_freq") or ())
    require(not has_mlp or width % tp == 0, tp_key, tp, f"a divisor of the model's MLP width, {width}")
    shared = model.get("moe_shared_expert_intermediate_size") or 0
    require(shared % tp == 0, tp_key, tp, f"a divisor of the width of the experts that all tokens pass, {shared}")


def _check_stages(config: Config, model: Mapping[str, Any]) -> None:
    layers, sizes = model["num_layers"], config.parallel.sizes
    pp, vpp = sizes.pipeline, sizes.virtual_pipeline
    require(layers % pp == 0, "pipeline_model_parallel_size", pp, f"a divisor of the model's {layers} layers")
    require(
        layers % (pp * (vpp or 1)) == 0,
        "virtual_pipeline_model_parallel_size",
        vpp,
        f"a divisor of the {layers // pp} layers of a pipeline stage",
    )


def _check_experts(config: Config, model: Mapping[str, Any]) -> None:
    experts, ep = model.get("num_moe_experts") or 0, config.parallel.expert_model_parallel_size
    require(
        ep == 1 or (experts > 0 and experts % ep == 0),
        "expert_model_parallel_size",
        ep,
        f"a divisor of the model's experts, of which it has {experts}",
    )
    if experts > 0:
        _check_moe(config)
    else:
        _check_dense(config)


def _check_dense(config: Config) -> None:
    coefficient, recompute = config.model.moe_aux_loss_coeff, config.recompute
    require(not coefficient, "moe_aux_loss_coeff", coefficient, "none; the model has no experts to balance")
    of_experts = [module for module in recompute.recompute_modules if module.startswith("moe")]
    require(
        recompute.recompute_granularity != "selective" or not of_experts,
        "recompute_modules",
        " ".join(of_experts),
        "mlp in its place; the model has no experts, so nothing would be recomputed",
    )


def _check_exports(config: Config) -> None:
    name, exports = config.model.push_to_hub, (config.model.export_hf, config.lora.export_adapter)
    require(name is None or any(exports), "push_to_hub", name, "export_hf or export_adapter with it, which is pushed")


def _check_lora(config: Config, model: Mapping[str, Any]) -> None:
    rank, side = config.lora.lora_rank, min(model["hidden_size"], model["ffn_hidden_size"])
    require((rank or 1) <= side, "lora_rank", rank, f"at most {side}, the shorter side of the model's layers")
    in_gate = [target for target in config.lora.lora_targets if target.startswith("linear_fc1_")]
    has_gate = model.get("gated_linear_unit", True) or not in_gate
    require(has_gate, "lora_targets", " ".join(in_gate), "linear_fc1; the model has no gate beside it")
    folder = config.lora.export_adapter
    is_apart = folder is None or folder != config.model.export_hf
    require(is_apart, "export_adapter", folder, "another folder than export_hf; one would replace the other")


def _check_moe(config: Config) -> None:
    parallel, lora = config.parallel, config.lora
    require(
        parallel.sequence_parallel or parallel.tensor_model_parallel_size == 1,
        "sequence_parallel",
        False,
        "true with tensor parallelism, as each rank of an MoE routes its own tokens; add --sequence-parallel",
    )
    recomputed = config.recompute.recompute_modules
    require(
        "mlp" not in recomputed,
        "recompute_modules",
        " ".join(recomputed),
        "moe in the place of mlp; experts are recomputed with their router",
    )
    in_experts = [target for target in lora.lora_targets if target.startswith("linear_fc")]
    require(
        lora.lora_rank is None or not in_experts,
        "lora_targets",
        ", ".join(in_experts),
        "linear_qkv and linear_proj only; experts get no adapters yet",
    )


def _check_batches(config: Config, layout: Layout) -> None:
    check_global_batch_size(
        config.batch.global_batch_size,
        dp_size=layout.data_parallel_size,
        microbatch_multiple=layout.microbatch_multiple,
    )
    # A full pack must be a multiple, too.
    BatchOptions(**asdict(config.batch), sequence_multiple=layout.sequence_multiple)


def _check_tp_comm_overlap(config: Config, model: Mapping[str, Any], machine: Machine) -> None:
    """Userbuffers are Transformer Engine's, have the shape of a microbatch, and know two kinds of FP8 tensors."""
    if not config.parallel.tp_comm_overlap:
        return
    recipe, sizes = config.precision.fp8_recipe, config.parallel.sizes
    rows = config.batch.tokens_per_microbatch // (sizes.context * sizes.tensor)
    for holds, expected in (
        (machine.has_cuda and machine.has_transformer_engine, "Transformer Engine on a GPU; leave it out without"),
        (model.get("latent") is None, "plain attention; its buffers have no place for matrices of latent attention"),
        (config.batch.fixed_pack_length, "fixed_pack_length with it; its buffers have the shape of one microbatch"),
        (config.precision.bf16, "bf16; its buffers hold nothing wider"),
        (config.lora.lora_rank is None, "no lora_rank beside it; adapters gather their inputs themselves"),
        (recipe != "blockwise", "another fp8_recipe than blockwise, whose tensors its buffers do not hold"),
        (recipe != "mxfp8" or rows % 128 == 0, f"a multiple of 128 tokens on each rank under mxfp8, found {rows}"),
    ):
        require(holds, "tp_comm_overlap", True, expected)


def _check_profiling(config: Config, world_size: int, machine: Machine) -> None:
    profiling, run = config.profiling, config.run
    has_profile, has_history = profiling.profile, profiling.record_memory_history
    for rank in profiling.profile_ranks if has_profile else ():
        require(rank < world_size, "profile_ranks", rank, f"a rank of this run, below {world_size}")
    nsight = "a CUDA device, and none is there; --use-pytorch-profiler profiles without one"
    require(machine.has_cuda or not has_profile or profiling.use_pytorch_profiler, "profile", True, nsight)
    require(machine.has_cuda or not has_history, "record_memory_history", True, "a CUDA device, and none is there")
    is_placed = run.save is not None
    traces = "save or tensorboard_dir with it; there is no folder for the traces"
    require(
        is_placed or run.tensorboard_dir is not None or not profiling.use_pytorch_profiler,
        "use_pytorch_profiler",
        True,
        traces,
    )
    require(is_placed or not has_history, "record_memory_history", True, "save with it; there is no folder for it")


def _microbatch_multiple(config: Config) -> int:
    """megatron's interleaved schedule runs microbatches in rounds of one per stage."""
    sizes = config.parallel.sizes
    return sizes.pipeline if (sizes.virtual_pipeline or 1) > 1 else 1


def sequence_multiple(*, fp8_recipe: str | None, tensor_shards: int, context_parallel_size: int) -> int:
    """Returns the multiple of tokens of a microbatch at which every rank's shard suits its matrix products.

    Args:
        tensor_shards: ranks that shard the tokens under sequence parallelism, 1 without it.
    """
    per_rank = 1 if fp8_recipe is None else FP8_MULTIPLE[fp8_recipe]
    # Causal context parallelism gives each rank one early and one late piece of the sequence.
    context = 2 * context_parallel_size if context_parallel_size > 1 else 1
    return math.prod((per_rank, context, tensor_shards))
