"""Architecture options of some model families that megatron-core's TransformerConfig lacks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from simpo_megatron.mcore.expert_choice import ExpertChoice
from simpo_megatron.mcore.latent_sizes import LatentSizes


@dataclass
class ArchitectureConfig(TransformerConfig):
    """megatron's TransformerConfig and, by transformers' names, the options of our specs and model."""

    attn_logit_softcapping: float | None = None
    """Attention scores become cap * tanh(score / cap) before the softmax."""

    final_logit_softcapping: float | None = None
    """The same for the output layer's logits."""

    embedding_multiplier: float = 1.0
    """Factor of the embedding's output, rounded to its dtype first."""

    logits_scaling: float = 1.0
    """Divisor of the output layer's logits."""

    post_layernorms: bool = False
    """Norms on what attention and MLP add to the residual, beside those on what they take from it."""

    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual."""

    attention_output_bias: bool = False
    """A bias of attention's output matrix where add_bias_linear, which is for all matrices, is off."""

    latent: LatentSizes | None = None
    """Multi-head latent attention; `kv_channels` is then the size of a value. None: plain attention."""

    windowed_rotary_base: float | None = None
    """Base of the rotary embedding of the layers that `windowed_rotary_freq` names; None: all layers have the same."""

    windowed_rotary_freq: list[int] | None = None
    """1 for each layer that has that base, 0 for the others."""

    expert_choice: ExpertChoice | None = None
    """The rule of an MoE's routers, in the place of megatron's moe_router_* options; None: those."""

    router_in_fp32: bool = False
    """True where routers have fp32 weights in a bf16 model, as transformers keeps them."""

    yarn_rotary_scaling_factor: float = math.e
    yarn_mscale: float = 0.0
    yarn_mscale_all_dim: float = 0.0
    """The source of megatron's factor of sine and cosine, here 1; see `rotary.concentration`."""

    moe_aux_loss_scale: float = 1.0
    """Factor of a microbatch's load-balancing loss; set anew for every step."""

    logs_balance_to_megatron: bool = False
    """Record load-balancing losses where Megatron-LM's own loop looks for them."""
