"""Core attention over packs in which chosen and rejected share their prompt, and the layout that describes a pack.

Shapes: S sequence, B batch, L queries of a segment, T keys of a segment, A attention heads, G key/value groups, R heads
of a group, D head size; heads and groups are this tensor-parallel rank's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.context import ContextShare


class Segment(NamedTuple):
    """Queries `[start, end)` see, causally from the bottom right, the keys of the prefix and then their own.

    Of a segment that is divided over context-parallel ranks, the queries are those from `first_query` on alone.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int
    first_query: int | None = None

    @property
    def num_queries(self) -> int:
        return self.end - (self.start if self.first_query is None else self.first_query)

    @property
    def num_keys(self) -> int:
        return self.prefix_end - self.prefix_start + self.end - self.start


@dataclass(frozen=True)
class VariableLengths:
    """A pack as variable-length attention kernels take it: each segment's keys contiguous, lengths as prefix sums."""

    key_rows_T: Tensor
    """int64, the rows of the pack's keys in the order of the segments, prefixes repeated."""
    cu_seqlens_q: Tensor
    """int32 [segments + 1], the queries before each segment."""
    cu_seqlens_kv: Tensor
    """int32 [segments + 1], the keys before each segment."""
    max_seqlen_q: int
    max_seqlen_kv: int

    @classmethod
    def of(cls, segments: tuple[Segment, ...], device: torch.device) -> VariableLengths:
        """The arguments for `segments`, whose queries tile this rank's rows in order."""
        rows = [torch.cat((torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end))) for s in segments]
        lengths = torch.tensor([[s.num_queries for s in segments], [s.num_keys for s in segments]])
        sums = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(device, torch.int32, non_blocking=True)
        return cls(
            key_rows_T=torch.cat(rows).to(device, non_blocking=True),
            cu_seqlens_q=sums[0],
            cu_seqlens_kv=sums[1],
            max_seqlen_q=int(lengths[0].max()),
            max_seqlen_kv=int(lengths[1].max()),
        )


@dataclass
class MicrobatchLayout(PackedSeqParams):
    """The segments and positions of one microbatch, which travel to megatron's layers as `packed_seq_params`.

    `qkv_format` stays "sbhd" and the `cu_seqlens` stay None, so that megatron's own rotary embedding takes its
    plain path over frequencies that the model has already put in the order of `position_ids_S`.
    """

    position_ids_S: Tensor | None = None
    """int64 [S], the position of each token in its own sequence; None for padded rows, where it is the index."""
    is_pack: bool = False
    """True where one row holds many sequences; otherwise every row is a sequence."""
    segments: tuple[Segment, ...] | None = None
    """Tile [0, S) of a pack; None for padded rows, each causal by itself. Keys are rows of the whole microbatch."""
    context: ContextShare | None = None
    """This rank's rows, where others hold the rest of every sequence: then S above counts this rank's rows."""
    _masks: dict[tuple[Segment, int | None], Tensor] = field(default_factory=dict)
    _varlen: VariableLengths | None = None

    @classmethod
    def of_padded_rows(cls, sequence_length: int) -> MicrobatchLayout:
        """The layout of B rows padded on the right to `sequence_length`."""
        return cls(qkv_format="sbhd", max_seqlen_q=sequence_length, max_seqlen_kv=sequence_length)

    @classmethod
    def of_pack(cls, position_ids_S: Tensor, segments: tuple[Segment, ...]) -> MicrobatchLayout:
        """The layout of one pack of whole pairs."""
        num_positions = int(position_ids_S.max()) + 1
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=num_positions,
            max_seqlen_kv=num_positions,
            position_ids_S=position_ids_S,
            is_pack=True,
            segments=segments,
        )

    def divided(self, context: ContextShare) -> MicrobatchLayout:
        """The layout of this context-parallel rank's rows of the microbatch."""
        rows = context.rows()
        positions_S = torch.arange(context.num_rows) if self.position_ids_S is None else self.position_ids_S
        whole = self.segments or (Segment(0, context.num_rows, 0, 0),)
        own = tuple(
            Segment(s.start, min(s.end, stop), s.prefix_start, s.prefix_end, max(s.start, start))
            for start, stop in context.pieces
            for s in whole
            if max(s.start, start) < min(s.end, stop)
        )
        return replace(
            self,
            position_ids_S=positions_S[rows.to(positions_S.device)],
            segments=own,
            context=context,
        )

    def mask(self, segment: Segment, window: int | None, device: torch.device) -> Tensor | None:
        """bool [L, T], True where a query sees a key; None for a segment that is plainly causal.

        With a `window` a query sees that many keys at most, its own the last of them. Keys lie in the order of their
        positions, so a window counts tokens of the sequence, prompt and response, wherever the pack holds them.

        Kept for the microbatch: every layer of this rank asks for the same ones.
        """
        num_before = segment.num_keys - segment.num_queries
        if window is not None and window >= segment.num_keys:
            window = None
        if num_before == 0 and window is None:
            return None
        if (segment, window) not in self._masks:
            visible = torch.ones(segment.num_queries, segment.num_keys, dtype=torch.bool, device=device)
            visible.tril_(diagonal=num_before)
            if window is not None:
                visible.triu_(diagonal=num_before - window + 1)
            self._masks[segment, window] = visible
        return self._masks[segment, window]

    def all_keys(self, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of the whole microbatch, from those of this rank's rows.

        Collectives: under context parallelism one all-gather over cp, and one reduce-scatter in the backward.
        """
        if self.context is None:
            return key_SBGD, value_SBGD
        sizes = [key_SBGD.size(-1), value_SBGD.size(-1)]
        key, value = self.context.gather(torch.cat((key_SBGD, value_SBGD), dim=-1)).split(sizes, dim=-1)
        return key, value

    def variable_lengths(self, device: torch.device) -> VariableLengths:
        """The arguments of variable-length kernels, computed once for the microbatch."""
        assert self.segments is not None, "padded rows have no variable lengths"
        if self._varlen is None:
            self._varlen = VariableLengths.of(self.segments, device)
        return self._varlen


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
        key_SBGD, value_SBGD = layout.all_keys(key_SBGD, value_SBGD)
        if layout.segments is None:
            whole = Segment(0, len(query_SBAD), 0, 0)
            mask = layout.mask(whole, self.window, query_SBAD.device)
            return _merge_heads(self._attend(query_SBAD, key_SBGD, value_SBGD, mask))
        # One gather and one split for all segments: a slice each would cost the backward a zeroed pack per slice.
        rows_T = layout.variable_lengths(query_SBAD.device).key_rows_T
        num_keys = [s.num_keys for s in layout.segments]
        parts = zip(
            layout.segments,
            query_SBAD.split([s.num_queries for s in layout.segments]),
            key_SBGD.index_select(0, rows_T).split(num_keys),
            value_SBGD.index_select(0, rows_T).split(num_keys),
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
