"""Core attention over packs in which chosen and rejected share their prompt.

Shapes: S sequence, B batch, L queries of a segment, T keys of a segment, A attention heads, G key/value groups, R heads
of a group, D head size; heads and groups are this tensor-parallel rank's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.layout import MicrobatchLayout, Segment


class SegmentedAttention(torch.nn.Module):
    """Core attention by scaled_dot_product_attention, one call per segment of a pack and no mask over the pack.

    Takes the place of megatron's DotProductAttention in a layer spec: same constructor, same call.

    Source: exact bottom-right causal attention over gathered keys, as variable-length kernels define it.
    """

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.softcap = config.attn_logit_softcapping
        is_windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # megatron counts the keys to the left of a query; with its own they are one more.
        self.window = config.window_size[0] + 1 if is_windowed else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SBAD: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: MicrobatchLayout | None = None,
    ) -> Tensor:
        """[S, B, A*D] in the dtype of the query, this rank's heads.

        Without a layout, or with one of padded rows, every row is causal by itself: padding stands on the right, where
        no real token sees it.
        """
        layout = packed_seq_params or MicrobatchLayout()
        key_TBGD, value_TBGD = layout.segment_keys(key_SBGD, value_SBGD)
        if layout.segments is None:
            whole = Segment(0, len(query_SBAD), 0, 0)
            mask = layout.mask(whole, self.window, query_SBAD.device)
            return _merge_heads(self._attend(query_SBAD, key_TBGD, value_TBGD, mask))
        num_keys = [s.num_keys for s in layout.segments]
        parts = zip(
            layout.segments,
            query_SBAD.split([s.num_queries for s in layout.segments]),
            key_TBGD.split(num_keys),
            value_TBGD.split(num_keys),
            strict=True,
        )
        outputs = [
            self._attend(query, key, value, layout.mask(segment, self.window, query.device))
            for segment, query, key, value in parts
        ]
        return _merge_heads(torch.cat(outputs, dim=2))

    def _attend(self, query_LBAD: Tensor, key_TBGD: Tensor, value_TBGD: Tensor, mask_LT: Tensor | None) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_LBAD, key_TBGD, value_TBGD))
        dropout = self.dropout if self.training else 0.0
        if self.softcap is not None:
            return _capped_attention(query, key, value, mask_LT, self.softmax_scale, self.softcap, dropout)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_LT,
            is_causal=mask_LT is None,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )


def _capped_attention(
    query_BALD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    mask_LT: Tensor | None,
    scale: float | None,
    cap: float,
    dropout: float,
) -> Tensor:
    """[B, A, L, D], with scores held within `cap`, which no kernel of torch does; scores in fp32 at least.

    Source: transformers.models.gemma2.modeling_gemma2.eager_attention_forward.
    """
    num_queries, size = query_BALD.shape[2:]
    if mask_LT is None:
        mask_LT = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query_BALD.device).tril_()
    scaled = query_BALD * (size**-0.5 if scale is None else scale)
    scores_BGRLT = scaled.unflatten(1, (key_BGTD.size(1), -1)) @ key_BGTD[:, :, None].transpose(-1, -2)
    scores_BGRLT = scores_BGRLT.to(torch.promote_types(scores_BGRLT.dtype, torch.float32))
    scores_BGRLT = (cap * torch.tanh(scores_BGRLT / cap)).masked_fill(~mask_LT, -torch.inf)
    weights_BGRLT = F.dropout(scores_BGRLT.softmax(dim=-1), dropout).to(value_BGTD.dtype)
    return (weights_BGRLT @ value_BGTD[:, :, None]).flatten(1, 2)


def _merge_heads(out_BASD: Tensor) -> Tensor:
    batch, _, length, _ = out_BASD.shape
    return out_BASD.permute(2, 0, 1, 3).reshape(length, batch, -1)
