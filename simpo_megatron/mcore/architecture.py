"""Options of some model families that megatron-core's TransformerConfig lacks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig


@dataclass
class ArchitectureConfig(TransformerConfig):
    """megatron's TransformerConfig and, by transformers' names, the options of our specs and model."""

    attn_logit_softcapping: float | None = None
    """Attention scores become cap * tanh(score / cap) before the softmax."""

    final_logit_softcapping: float | None = None
    """The same for the output layer's logits."""

    embedding_multiplier: float = 1.0
    """Factor of the embedding's output, rounded to its dtype first."""

    post_layernorms: bool = False
    """Norms on what attention and MLP add to the residual, beside those on what they take from it."""

    moe_aux_loss_scale: float = 1.0
    """Factor of a microbatch's load-balancing loss; set anew for every step."""
