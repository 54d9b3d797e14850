"""Weights kept in fp32 in a bf16 model: trained by megatron's optimizers, which need help to store their state.

Both optimizers number a group's parameters as if all had one dtype, so fp32 ones get a group of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import (
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from torch import Tensor


def own_groups(config: OptimizerConfig) -> dict[str, Any]:
    """Arguments of get_megatron_optimizer by which the fp32 weights of a bf16 model have a group of their own."""
    if not config.bf16:
        return {}
    is_fp32 = ParamKey(predicate=ParamPredicate("is_fp32", lambda weight: weight.dtype == torch.float32))
    # A key by which megatron tells groups in a checkpoint apart, and which changes nothing else.
    apart: Any = {"is_decoupled_lr": True}
    return {"config_overrides": {**get_standard_config_overrides(config), is_fp32: apart}}


class _Optimizer(Float16OptimizerWithFloat16Params):
    """megatron's optimizer of bf16 weights, which stores the state of its fp32 weights too."""

    float16_groups: list[list[Tensor]]
    fp32_from_float16_groups: list[list[Tensor]]

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state with each tensor's place in the whole; an fp32 weight counts as its own master.

        megatron looks for the places of bf16 weights alone, and cannot load a group that has no masters.
        """
        before = self.float16_groups, self.fp32_from_float16_groups
        # The weights of one group are all fp32, or none is.
        self.float16_groups, self.fp32_from_float16_groups = (
            [bf16 or fp32 for bf16, fp32 in zip(groups, self.fp32_from_fp32_groups, strict=True)] for groups in before
        )
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.float16_groups, self.fp32_from_float16_groups = before


def let_store(optimizer: MegatronOptimizer) -> None:
    """Make the parts of `optimizer` that have fp32 weights beside bf16 ones store the state of both."""
    for single in optimizer.chained_optimizers:
        if type(single) is Float16OptimizerWithFloat16Params and not single.is_stub_optimizer:
            single.__class__ = _Optimizer
