"""Core attention over packs by Transformer Engine's variable-length kernels; importable only where it is installed."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from simpo_megatron.mcore.attention import MicrobatchLayout


class TESegmentedAttention(TEDotProductAttention):
    """megatron's TEDotProductAttention, one call for all segments of a pack.

    The keys of a segment, its prefix and its own, are gathered so that they lie one behind the other; queries are
    fewer than keys where there is a prefix, and causal from the bottom right, which Transformer Engine calls
    `padding_causal_bottom_right` and megatron's mask types have no name for. A layer's sliding window, which megatron
    hands to the constructor, is counted from the bottom right as well: in tokens of the sequence.
    """

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
        layout = packed_seq_params
        if layout is None or layout.segments is None:
            return super().forward(query_SBAD, key_SBGD, value_SBGD, attention_mask, attn_mask_type)
        lengths = layout.variable_lengths(query_SBAD.device)
        # Past megatron's own forward, which knows no bottom-right mask, to Transformer Engine's.
        out = super(TEDotProductAttention, self).forward(
            query_SBAD[:, 0],
            key_SBGD[:, 0].index_select(0, lengths.key_rows_T),
            value_SBGD[:, 0].index_select(0, lengths.key_rows_T),
            None,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=lengths.cu_seqlens_q,
            cu_seqlens_kv=lengths.cu_seqlens_kv,
            max_seqlen_q=lengths.max_seqlen_q,
            max_seqlen_kv=lengths.max_seqlen_kv,
        )
        return out.reshape(query_SBAD.size(0), 1, -1)
