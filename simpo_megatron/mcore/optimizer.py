"""megatron's optimizer and learning-rate schedule from our configuration, and one checked update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from simpo_megatron import faults
from simpo_megatron.config import Config, schedule_steps
from simpo_megatron.errors import NumericsError
from simpo_megatron.mcore import device
from simpo_megatron.mcore.fp8_weights import gather, quantise_masters
from simpo_megatron.mcore.fp32_weights import let_store, own_groups
from simpo_megatron.mcore.precision import parameter_dtype


def build_optimizer(
    chunks: list[DistributedDataParallel], config: Config, train_iters: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """megatron's Adam over the chunks (plain or distributed) and its schedule, which counts optimizer steps.

    Side effect: sets how megatron's schedules scale the loss and finish the gradients of these chunks.

    Collectives: those of `quantise_masters`.
    """
    settings, precision = config.optimizer, config.precision
    warmup_steps, decay_steps = schedule_steps(config, train_iters)
    options = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=precision.bf16,
        params_dtype=parameter_dtype(precision),
        fp8_recipe=precision.fp8_recipe,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(options, chunks, use_gloo_process_groups=False, **own_groups(options))
    let_store(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
    )
    if device.adam() is torch.optim.AdamW:
        # In one pass over a weight, for which megatron has no option: a ninth of the time on a CPU; on a GPU nothing
        # beside the moments, where torch's default makes 4 bytes a parameter in each update.
        for group in optimizer.param_groups:
            group["fused"] = True
    _teach_schedules(chunks, optimizer)
    quantise_masters(chunks, optimizer)
    return optimizer, scheduler


def _teach_schedules(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    mcore_config = chunks[0].module.config
    mcore_config.grad_scale_func = optimizer.scale_loss
    mcore_config.finalize_model_grads_func = finalize_model_grads
    if chunks[0].ddp_config.overlap_grad_reduce:
        mcore_config.no_sync_func = _per_chunk([chunk.no_sync for chunk in chunks])
        if len(chunks) > 1:
            mcore_config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if chunks[0].ddp_config.overlap_param_gather and len(chunks) > 1:
        mcore_config.param_sync_func = [chunk.start_param_sync for chunk in chunks]


def forget_optimizer(chunks: Sequence[DistributedDataParallel]) -> None:
    """Remove the chunks' references to the optimizer that was built over them, so that its memory is freed."""
    chunks[0].module.config.grad_scale_func = None
    for chunk in chunks:
        for parameter in chunk.parameters():
            # megatron's handle on the fp32 master of a bf16 weight.
            if hasattr(parameter, "main_param"):
                del parameter.main_param


def _per_chunk(functions: list[Callable[..., Any]]) -> list[Callable[..., Any]] | Callable[..., Any]:
    return functions if len(functions) > 1 else functions[0]


def zero_gradients(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Clear DDP's gradient buffers and the optimizer's own references before a step."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def update(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> tuple[float, float]:
    """(gradient norm before clipping, learning rate used) of one optimizer step, the schedule moved on by one.

    Collectives: megatron's norm reductions over the model-parallel group (the world under the distributed optimizer).

    Raises:
        NumericsError: when the norm is not finite, on every rank alike; weights and moments are then untouched.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        raise NumericsError(
            f"grad_norm: found {grad_norm}, expected a finite number; weights, moments and schedule are as "
            "before the step"
        )
    learning_rate = max(group["lr"] for group in optimizer.param_groups)
    faults.at("update")
    with _known_norm(optimizer, grad_norm):
        optimizer.step()
    scheduler.step(increment=1)
    return grad_norm, learning_rate


@contextmanager
def _known_norm(optimizer: Any, grad_norm: float) -> Iterator[None]:
    """While the context lasts, the optimizer has this norm.

    megatron's step would compute it again: one more pass over all gradients, reduction and wait for the device.
    """
    optimizer.get_grad_norm = lambda: grad_norm
    try:
        yield
    finally:
        del optimizer.get_grad_norm


def reserve_moments(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Allocates the memory of the moments that Adam allocates in its first update; dropping the list frees it."""
    return [
        torch.empty(2 * parameter.numel(), dtype=torch.float32, device=parameter.device)
        for single in optimizer.chained_optimizers
        for group in single.optimizer.param_groups
        for parameter in group["params"]
        if parameter not in single.optimizer.state
    ]


def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather the updated shards of every parameter, for a reader other than a forward pass, such as an export.

    Under `overlap_param_gather` the ranks' updated parts are gathered only when the next forward pass needs them.

    Collectives: one all-gather of the parameters over dp under `overlap_param_gather`, else none.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            gather(chunk)
