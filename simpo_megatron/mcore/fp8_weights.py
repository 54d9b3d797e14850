"""Weights kept in FP8: loaders and checkpoints use the values of their fp32 masters, never the FP8 values.

Such a weight is a Transformer Engine tensor of one byte a value and a scale. Until the optimizer is built, the values
it was made from stay in the host's memory; a loader writes there. Then megatron's distributed optimizer takes its fp32
masters from them (`get_high_precision_init_val`). From then on megatron quantises the masters after every update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def plain(weight: Tensor) -> Tensor:
    """The weight as a tensor of its dtype, without gradient: itself, or its dequantised FP8 values."""
    return dequantize_fp8_tensor(weight.detach()) if is_float8tensor(weight) else weight.detach()


def awaited_values(chunks: Iterable[torch.nn.Module]) -> dict[Tensor, Tensor]:
    """{FP8 weight: tensor to fill instead}, of its shape and dtype, in the host's memory.

    Only before the optimizer is built, which takes these values as its masters and frees them.
    """
    return {
        weight: weight.get_high_precision_init_val()  # type: ignore[attr-defined]  # of Transformer Engine's tensors
        for weight in _kept_in_fp8(chunks)
    }


def quantise_masters(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Quantise the masters into every FP8 weight, as an update does; does nothing without FP8 weights.

    Collectives: Transformer Engine's maximum of each weight and an all-gather of all weights, over dp.
    """
    if not _kept_in_fp8(chunks):
        return
    for single in optimizer.chained_optimizers:
        single._copy_main_params_to_model_params()
    for chunk in chunks:
        gather(chunk)


def gather(chunk: DistributedDataParallel) -> None:
    """Gather the updated shards of every weight now, for a reader other than a forward pass.

    Collectives: one all-gather of the weights over dp.
    """
    chunk.start_param_sync(force_sync=True)
    weights = _kept_in_fp8([chunk])
    if weights and chunk.ddp_config.overlap_param_gather:
        # megatron renews the transposed copies only after a gather that a forward pass has waited for.
        post_all_gather_processing(weights)


def whole_masters(optimizer: MegatronOptimizer) -> dict[Tensor, Tensor]:
    """{FP8 weight: its masters}, gathered and rounded to its dtype, in the host's memory.

    Collectives: for each FP8 weight one all-reduce of its size over dp.
    """
    masters = {}
    for single in optimizer.chained_optimizers:
        if not isinstance(single, DistributedOptimizer) or single.is_stub_optimizer:
            continue
        for weight, shard, start in zip(*single._get_fp8_params_and_shard_fp32_from_fp8(), strict=True):
            whole = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            if shard is not None:
                whole.view(-1)[start : start + shard.numel()].copy_(shard)
            # One rank holds each value, and adding zeros changes none.
            dist.all_reduce(whole, group=single.data_parallel_group)
            masters[weight] = whole.cpu()
    return masters


def _kept_in_fp8(chunks: Iterable[torch.nn.Module]) -> list[Tensor]:
    return [weight for chunk in chunks for weight in chunk.parameters() if is_float8tensor(weight)]
