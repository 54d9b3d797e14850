"""The experts of one MoE layer, of any of megatron-core's kinds, at the sizes that a test asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules

from simpo_megatron.mcore.architecture import ArchitectureConfig


def experts_of(
    kind: type, num_experts: int, *, hidden: int, width: int, dtype: torch.dtype, has_bias: bool = False
) -> torch.nn.Module:
    """`num_experts` gated SiLU experts of `kind`, their weights not drawn; needs the groups of a started run."""
    config = ArchitectureConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=2,
        num_moe_experts=num_experts,
        moe_ffn_hidden_size=width,
        ffn_hidden_size=width,
        add_bias_linear=has_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups(["ep", "expt_tp", "expt_dp"])
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return kind(num_experts, config, submodules, pg_collection=collection)
