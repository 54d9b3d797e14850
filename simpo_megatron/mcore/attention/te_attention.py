"""Core attention over packs by Transformer Engine's variable-length kernels; importable only where it is installed."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron.data.batching import round_up
from simpo_megatron.mcore.microbatch import MicrobatchLayout

# Length bounds are rounded up to this step: Transformer Engine selects a backend anew for each new bound.
_BOUND_MULTIPLE = 256


class TESegmentedAttention(TEDotProductAttention):
    """megatron's TEDotProductAttention, one call for all segments of a pack.

    The keys of a segment, first its prefix's, then its own, are gathered into contiguous rows. With a prefix there are
    fewer queries than keys, and the mask is causal from the bottom right. Transformer Engine calls that
    `padding_causal_bottom_right`; megatron's mask types have no name for it. A layer's sliding window, which megatron
    passes to the constructor, counts from the bottom right as well: in tokens of the sequence.

    Under context parallelism, padded rows use Transformer Engine's own form, which passes keys around the ranks. That
    form has no prefix. So for a pack, each rank gathers all keys and values and computes the queries of its rows.
    """

    def __init__(self, *, attention_type: str, **options: Any) -> None:
        # Queries are fewer than keys where there is a prefix. Under megatron's "self" the kernel that writes the scores
        # out, Transformer Engine's last resort, would mask keys by the lengths of the queries.
        super().__init__(attention_type="cross", **options)

    def forward(
        self,
        query_SBAD: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: MicrobatchLayout | None = None,
    ) -> Tensor:
        """[S, B, A*D] in the dtype of the query, this rank's heads; padded rows as megatron computes them."""
        layout = packed_seq_params or MicrobatchLayout()
        if self.config.context_parallel_size > 1:
            self._divide_over(None if layout.context is None or layout.is_pack else layout.context.group)
        if not layout.is_pack:
            return super().forward(query_SBAD, key_SBGD, value_SBGD, attention_mask, attn_mask_type)
        assert layout.lengths is not None, "a pack has lengths"
        lengths = layout.lengths
        key_TBGD, value_TBGD = layout.segment_keys(key_SBGD, value_SBGD)
        # Calls Transformer Engine's forward directly: megatron's has no bottom-right mask.
        out = super(TEDotProductAttention, self).forward(
            query_SBAD[:, 0],
            key_TBGD[:, 0],
            value_TBGD[:, 0],
            None,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=lengths.cu_seqlens_q,
            cu_seqlens_kv=lengths.cu_seqlens_kv,
            max_seqlen_q=round_up(lengths.max_seqlen_q, _BOUND_MULTIPLE),
            max_seqlen_kv=round_up(lengths.max_seqlen_kv, _BOUND_MULTIPLE),
        )
        return out.reshape(query_SBAD.size(0), 1, -1)

    def _divide_over(self, cp_group: ProcessGroup | None) -> None:
        """Let Transformer Engine pass keys around `cp_group` or, with None, use only the keys it is given."""
        ranks = None if cp_group is None else dist.get_process_group_ranks(cp_group)
        stream = None if cp_group is None else TEDotProductAttention.cp_stream
        self.set_context_parallel_group(cp_group, ranks, stream, "p2p")
