"""Layer specifications: megatron's own layers, with the attention and norms that this machine and a pack need."""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from simpo_megatron.mcore.attention import SegmentedAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under megatron's constructor, its weight marked for the sequence-parallel gradient all-reduce.

    megatron's stock torch norm refuses sequence parallelism because it lacks the mark that finalize_model_grads reads.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One transformer layer of megatron's own torch modules, for machines without Transformer Engine."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SegmentedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def transformer_engine_layer_spec(config: TransformerConfig, *, fuse_norms: bool = True) -> ModuleSpec:
    """One transformer layer of Transformer Engine's modules, which FP8 needs.

    Without `fuse_norms` the norms before attention and MLP are layers of their own, as adapters need them: of a layer
    that fuses its norm, nobody else sees the normed input.
    """
    from simpo_megatron.mcore.te_attention import TESegmentedAttention

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    layer = spec.submodules
    layer.self_attention.submodules.core_attention = TESegmentedAttention
    if not fuse_norms:
        layer.input_layernorm = layer.pre_mlp_layernorm = TENorm
        layer.self_attention.submodules.linear_qkv = layer.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    return spec


def block_spec(
    config: TransformerConfig, vp_stage: int | None, *, transformer_engine: bool, fuse_norms: bool = True
) -> TransformerBlockSubmodules:
    """The decoder of this rank's (virtual) pipeline stage: its layers and the norm that ends the last stage."""
    num_layers = get_num_layers_to_build(config, vp_stage)
    if transformer_engine:
        layer, norm = transformer_engine_layer_spec(config, fuse_norms=fuse_norms), TENorm
    else:
        layer, norm = local_layer_spec(config), RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
