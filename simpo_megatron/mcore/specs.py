"""Layer specifications: megatron's own layers, with attention and norms for packs on this machine."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from megatron.core.utils import is_te_min_version

from simpo_megatron.mcore import device
from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.attention.latent_attention import LatentAttention, LatentAttentionSubmodules
from simpo_megatron.mcore.attention.segmented_attention import SegmentedAttention, TwoRotarySelfAttention
from simpo_megatron.mcore.layers import (
    GroupedExperts,
    LeanTransformerLayer,
    LoadBalancedRouter,
    RMSNorm,
    SwiGLU,
    has_grouped_product,
)


@functools.cache
def with_post_norm(linear: type[torch.nn.Module], norm: type) -> type[torch.nn.Module]:
    """megatron's row-parallel `linear` with a `norm` on its output, before it is added to the residual."""

    class PostNormLinear(linear):  # type: ignore[misc,valid-type]  # mypy knows no class that is an argument
        def __init__(self, *args: Any, config: ArchitectureConfig, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            self.post_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)
            # A hook, so that an adapter beside the layer can come before it.
            self.register_forward_hook(lambda layer, _, outputs: (layer.post_layernorm(outputs[0]), outputs[1]))

    return PostNormLinear


@functools.cache
def with_bias(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """megatron's row-parallel `linear`, always with a bias."""

    class BiasedLinear(linear):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return BiasedLinear


@functools.cache
def with_multiplier(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """megatron's row-parallel `linear` whose outputs and bias are multiplied by `residual_multiplier`."""

    class MultipliedLinear(linear):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, config: ArchitectureConfig, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            self.residual_multiplier = config.residual_multiplier
            self.register_forward_hook(lambda layer, _, outputs: tuple(map(layer.multiplied, outputs)))

        def multiplied(self, output: torch.Tensor | None) -> torch.Tensor | None:
            return None if output is None else output * self.residual_multiplier

    return MultipliedLinear


def add_to_residual(config: ArchitectureConfig, layer: TransformerLayerSubmodules, linear: Any, norm: type) -> None:
    """Add to the ends of `layer`'s attention and MLP what `config` asks for: a bias, a norm or a multiplier."""
    attention = layer.self_attention.submodules
    of_attention: Any = with_bias(linear) if config.attention_output_bias else linear
    of_mlp = linear
    if config.post_layernorms:
        of_attention, of_mlp = with_post_norm(of_attention, norm), with_post_norm(of_mlp, norm)
    if config.residual_multiplier != 1:
        of_attention, of_mlp = with_multiplier(of_attention), with_multiplier(of_mlp)
    if of_attention is not linear:
        attention.linear_proj = of_attention
    if of_mlp is not linear:
        mlp_submodules(layer).linear_fc2 = of_mlp


def local_layer_spec(config: ArchitectureConfig, *, num_experts: int | None = None) -> ModuleSpec:
    """One transformer layer of megatron's own torch modules, for machines without Transformer Engine.

    With `num_experts` it is an MoE.
    """
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    if not device.has_cuda():
        # Only the CPU's norms and activation mark their outputs; on a GPU its hooks would cost time for nothing.
        spec.module = LeanTransformerLayer
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SegmentedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.use_te_activation_func:
        mlp_submodules(layer).activation_func = SwiGLU
    if num_experts is not None:
        mlp_submodules(layer).router = LoadBalancedRouter
    if config.windowed_rotary_base is not None:
        layer.self_attention.module = TwoRotarySelfAttention
    if config.latent is not None:
        set_latent_attention(layer, ColumnParallelLinear, RowParallelLinear, RMSNorm, SegmentedAttention)
    add_to_residual(config, layer, RowParallelLinear, RMSNorm)
    if num_experts is not None and config.bf16 and has_grouped_product(device.machine().compute_capability):
        group_experts(mlp_submodules(layer))
    return spec


def transformer_engine_layer_spec(
    config: ArchitectureConfig, *, num_experts: int | None = None, fuse_norms: bool = True
) -> ModuleSpec:
    """One transformer layer of Transformer Engine's modules, which FP8 needs; with `num_experts` it is an MoE.

    Without `fuse_norms` the norms before attention and MLP are separate layers. Adapters need that: a layer that fuses
    its norm does not expose the normed input.
    """
    from simpo_megatron.mcore.attention.te_attention import TESegmentedAttention

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    layer = spec.submodules
    attention = layer.self_attention.submodules
    attention.core_attention = TESegmentedAttention if _engine_has_scores_of(config) else SegmentedAttention
    if not fuse_norms:
        layer.input_layernorm, attention.linear_qkv = TENorm, TEColumnParallelLinear
    if num_experts is not None:
        mlp_submodules(layer).router = LoadBalancedRouter
    elif not fuse_norms:
        layer.pre_mlp_layernorm, mlp_submodules(layer).linear_fc1 = TENorm, TEColumnParallelLinear
    if config.windowed_rotary_base is not None:
        layer.self_attention.module = TwoRotarySelfAttention
    if config.latent is not None:
        core = functools.partial(
            TESegmentedAttention, k_channels=config.latent.query_size, v_channels=config.latent.v_head_dim
        )
        set_latent_attention(layer, TEColumnParallelLinear, TERowParallelLinear, TENorm, core)
    add_to_residual(config, layer, TERowParallelLinear, TENorm)
    return spec


def _engine_has_scores_of(config: ArchitectureConfig) -> bool:
    """False for a soft cap, and for sinks before 2.20: only torch's operations, which write the scores out, have them.

    Source: get_attention_backend of Transformer Engine 2.9 and 2.20, for packs.
    """
    has_sinks = config.softmax_type != "vanilla"
    return config.attn_logit_softcapping is None and (not has_sinks or is_te_min_version("2.20.0"))


def set_latent_attention(
    layer: TransformerLayerSubmodules, linear: Any, linear_proj: Any, norm: type, core_attention: Any
) -> None:
    """Give `layer` latent attention, and before it a norm that no other layer includes."""
    layer.self_attention = ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=LatentAttentionSubmodules(linear, linear_proj, norm, core_attention),
    )
    layer.input_layernorm = norm
    # In a checkpoint that norm has its own name, too.
    kept = {key: name for key, name in layer.sharded_state_dict_keys_map.items() if key != "input_layernorm."}
    layer.sharded_state_dict_keys_map = kept


def group_experts(moe: Any) -> None:
    """Let the experts of an MoE layer be multiplied together, if nothing stands behind their products.

    megatron-core 0.16 keeps them in a ModuleSpec, the newest in a function with its arguments.
    """
    experts = moe.experts
    submodules = experts.submodules if isinstance(experts, ModuleSpec) else experts.keywords["submodules"]
    if (submodules.linear_fc1, submodules.linear_fc2) != (ColumnParallelLinear, RowParallelLinear):
        return
    if isinstance(experts, ModuleSpec):
        experts.module = GroupedExperts
    else:
        moe.experts = functools.partial(GroupedExperts, **experts.keywords)


def mlp_submodules(layer: TransformerLayerSubmodules) -> MLPSubmodules:
    """The submodules of the layer's MLP; the newest megatron-core no longer keeps them in a ModuleSpec."""
    mlp = layer.mlp
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]


def block_spec(
    config: ArchitectureConfig, vp_stage: int | None, *, transformer_engine: bool, fuse_norms: bool = True
) -> TransformerBlockSubmodules:
    """The decoder of this rank's (virtual) pipeline stage: its layers and the norm that ends the last stage."""
    kind: Any = local_layer_spec
    norm: type = RMSNorm
    if transformer_engine:
        kind, norm = functools.partial(transformer_engine_layer_spec, fuse_norms=fuse_norms), TENorm
    first = get_transformer_layer_offset(config, vp_stage)
    pattern = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [1] * config.num_layers
    has_experts = pattern[first : first + get_num_layers_to_build(config, vp_stage)]
    specs = {
        kind_of_mlp: kind(config, num_experts=config.num_moe_experts if kind_of_mlp else None)
        for kind_of_mlp in set(has_experts)
    }
    return TransformerBlockSubmodules(layer_specs=[specs[here] for here in has_experts], layer_norm=norm)
