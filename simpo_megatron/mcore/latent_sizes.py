"""The sizes of multi-head latent attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """The sizes of multi-head latent attention, by megatron's names."""

    q_lora_rank: int | None
    """Of the latent of queries; None: they are made of the hidden states."""
    kv_lora_rank: int
    """Of the latent of keys and values."""
    qk_head_dim: int
    """Of the part of a query or key that knows no position."""
    qk_pos_emb_head_dim: int
    """Of the part that turns."""
    v_head_dim: int
    """Of a value."""

    @property
    def query_size(self) -> int:
        """Size of a query or key."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim
