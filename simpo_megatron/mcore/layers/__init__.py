"""Layers that differ from megatron's: norms and MLPs that keep less for the backward, the embedding, and experts."""

from simpo_megatron.mcore.layers.embedding import MainGradEmbedding
from simpo_megatron.mcore.layers.experts import (
    LOAD_BALANCING_LOSS,
    ROUTER_BIAS,
    LoadBalancedRouter,
    has_router_bias,
    load_balancing_coefficient,
    take_load_balancing_loss,
    times_transformers,
    weigh_load_balancing,
    weights_of,
)
from simpo_megatron.mcore.layers.grouped_experts import GroupedExperts, has_grouped_product
from simpo_megatron.mcore.layers.lean_layers import LeanTransformerLayer, RMSNorm, SwiGLU

__all__ = [
    "LOAD_BALANCING_LOSS",
    "ROUTER_BIAS",
    "GroupedExperts",
    "LeanTransformerLayer",
    "LoadBalancedRouter",
    "MainGradEmbedding",
    "RMSNorm",
    "SwiGLU",
    "has_grouped_product",
    "has_router_bias",
    "load_balancing_coefficient",
    "take_load_balancing_loss",
    "times_transformers",
    "weigh_load_balancing",
    "weights_of",
]
