"""The sizes of multi-head latent attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """The sizes of multi-head latent attention, by megatron's names."""

    q_lora_rank: int | None
    """Size of the latent of queries; None: queries are computed from the hidden states."""
    kv_lora_rank: int
    """Size of the latent of keys and values."""
    qk_head_dim: int
    """Size of the part of a query or key without rotary embedding."""
    qk_pos_emb_head_dim: int
    """Size of the rotated part."""
    v_head_dim: int
    """Size of a value."""

    @property
    def query_size(self) -> int:
        """Size of a query or key."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim
