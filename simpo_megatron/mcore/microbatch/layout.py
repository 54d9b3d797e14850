"""The segments and positions of a microbatch, as attention and megatron's layers read them.

Shapes: S rows of the whole microbatch, B sequences side by side, T keys of all segments, L queries of a segment, G
key/value groups, D head size. Tensors are made on the CPU; `on` copies them to a device, or a caller does by `tensors`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from simpo_megatron.mcore.microbatch.context import ContextShare
from simpo_megatron.mcore.microbatch.transfer import copied_together


class Segment(NamedTuple):
    """Queries `[start, end)` attend to the keys of the prefix and then their own, causally from the bottom right.

    For a segment that is divided over context-parallel ranks, this rank's queries start at `first_query`.
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
    """A microbatch as variable-length attention kernels take it: each segment's keys contiguous, lengths as sums."""

    key_rows_T: Tensor | None
    """int64, the places of the keys of the segments, one segment after the other, among those that a rank sees; the
    same in each of B sequences. None where they lie so already."""
    cu_seqlens_q: Tensor
    """int32 [B * segments + 1], the queries before each segment, of one sequence after the other."""
    cu_seqlens_kv: Tensor
    """int32 [B * segments + 1], the keys before each segment."""
    max_seqlen_q: int
    max_seqlen_kv: int

    @classmethod
    def of(cls, segments: tuple[Segment, ...], num_sequences: int, context: ContextShare | None) -> VariableLengths:
        """The lengths of `segments`, whose queries tile this rank's rows in order."""
        ranges = [keys for s in segments for keys in ((s.prefix_start, s.prefix_end), (s.start, s.end))]
        rows_T = torch.cat([torch.arange(*keys) for keys in ranges])
        if context is not None:
            rows_T = context.places()[rows_T]
        queries, keys = [s.num_queries for s in segments], [s.num_keys for s in segments]
        return cls(
            key_rows_T=None if context is None and torch.equal(rows_T, torch.arange(segments[-1].end)) else rows_T,
            cu_seqlens_q=_sums(queries * num_sequences),
            cu_seqlens_kv=_sums(keys * num_sequences),
            max_seqlen_q=max(queries),
            max_seqlen_kv=max(keys),
        )


def _sums(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


@dataclass
class MicrobatchLayout(PackedSeqParams):
    """The segments and positions of one microbatch, which travel to megatron's layers as `packed_seq_params`.

    `qkv_format` stays "sbhd" and the `cu_seqlens` stay None. So megatron's own rotary embedding takes its plain path
    over frequencies that are in the order of `position_ids_S` already.
    """

    position_ids_S: Tensor | None = None
    """int64 [S], the position of each token in its own sequence; None for padded rows, where it is the index."""
    is_pack: bool = False
    """True where one row holds many sequences; otherwise every row is a sequence."""
    segments: tuple[Segment, ...] | None = None
    """Tile [0, S) of a pack; None for padded rows, each causal by itself. Keys are rows of the whole microbatch."""
    lengths: VariableLengths | None = None
    """The same for variable-length kernels; of padded rows, too."""
    context: ContextShare | None = None
    """This rank's rows, where others hold the rest of every sequence: then S above counts this rank's rows."""
    padding_BS: Tensor | None = None
    """bool [B, S], True for padding, which an MoE must not count; None where the whole microbatch has none."""
    _masks: dict[tuple[Segment, int | None], Tensor] = field(default_factory=dict)
    _added_masks: WeakValueDictionary[tuple[Segment, int | None], Tensor] = field(default_factory=WeakValueDictionary)

    @classmethod
    def of_padded_rows(
        cls, sequence_length: int, num_rows: int = 1, context: ContextShare | None = None
    ) -> MicrobatchLayout:
        """The layout of `num_rows` rows padded on the right to `sequence_length`; with a context, of this rank's."""
        whole = (Segment(0, sequence_length, 0, 0),)
        own = whole if context is None else _own(whole, context)
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=sequence_length,
            max_seqlen_kv=sequence_length,
            position_ids_S=None if context is None else context.rows(),
            segments=None if context is None else own,
            lengths=VariableLengths.of(own, num_rows, context),
            context=context,
        )

    @classmethod
    def of_pack(
        cls, position_ids_S: Tensor, segments: tuple[Segment, ...], context: ContextShare | None = None
    ) -> MicrobatchLayout:
        """The layout of one pack of whole pairs; with a context, of this rank's rows of it."""
        num_positions = int(position_ids_S.max()) + 1
        own = segments if context is None else _own(segments, context)
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=num_positions,
            max_seqlen_kv=num_positions,
            position_ids_S=position_ids_S if context is None else position_ids_S[context.rows()],
            is_pack=True,
            segments=own,
            lengths=VariableLengths.of(own, 1, context),
            context=context,
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The layout's tensors, in the order of `with_tensors`."""
        assert self.lengths is not None, "of_pack and of_padded_rows make layouts"
        lengths = self.lengths
        return self.position_ids_S, lengths.key_rows_T, lengths.cu_seqlens_q, lengths.cu_seqlens_kv, self.padding_BS

    def with_tensors(
        self,
        position_ids_S: Tensor | None,
        key_rows_T: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        padding_BS: Tensor | None,
    ) -> MicrobatchLayout:
        """The layout with its tensors' copies on a device."""
        assert self.lengths is not None, "of_pack and of_padded_rows make layouts"
        lengths = replace(self.lengths, key_rows_T=key_rows_T, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
        return replace(self, position_ids_S=position_ids_S, lengths=lengths, padding_BS=padding_BS)

    def on(self, device: torch.device) -> MicrobatchLayout:
        """The layout on `device`, by one copy."""
        return self.with_tensors(*copied_together(self.tensors(), device))  # type: ignore[arg-type]  # as many as given

    def mask(self, segment: Segment, window: int | None, device: torch.device) -> Tensor | None:
        """bool [L, T], True where a query sees a key; None for a segment that is plainly causal.

        With a `window` a query attends to that many keys at most, the last being its own. Keys are ordered by position,
        so a window counts tokens of the sequence, prompt and response, wherever the pack holds them.

        Cached for the microbatch: every layer of this rank asks for the same masks.
        """
        window = _narrow(window, segment)
        if segment.num_keys == segment.num_queries and window is None:
            return None
        if (segment, window) not in self._masks:
            self._masks[segment, window] = _visible(segment, window, device)
        return self._masks[segment, window]

    def added_mask(self, segment: Segment, window: int | None, like: Tensor) -> Tensor | None:
        """`mask` as numbers in the dtype of `like`, which are added to scores: 0 where a query sees a key, else -inf.

        Layers share it while one of them holds it. torch's kernels would make one for each layer of a bool mask.
        """
        window = _narrow(window, segment)
        if segment.num_keys == segment.num_queries and window is None:
            return None
        added = self._added_masks.get((segment, window))
        if added is None:
            hidden = _visible(segment, window, like.device).logical_not_()
            added = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
            self._added_masks[segment, window] = added
        return added

    def segment_keys(self, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of the segments, one after the other, [T, B, G, D], from those of this rank's rows.

        One gather for all segments: with a slice for each, the backward would zero a whole pack per slice.

        Collectives: under context parallelism one all-gather over cp, and one reduce-scatter in the backward.
        """
        if self.context is not None:
            sizes = [key_SBGD.size(-1), value_SBGD.size(-1)]
            both = self.context.gather(torch.cat((key_SBGD, value_SBGD), dim=-1))
            key_SBGD, value_SBGD = both.split(sizes, dim=-1)
        if self.lengths is None or self.lengths.key_rows_T is None:
            return key_SBGD, value_SBGD
        rows_T = self.lengths.key_rows_T
        return key_SBGD.index_select(0, rows_T), value_SBGD.index_select(0, rows_T)


def _narrow(window: int | None, segment: Segment) -> int | None:
    """`window` where it hides keys of `segment`, else None."""
    return None if window is not None and window >= segment.num_keys else window


def _visible(segment: Segment, window: int | None, device: torch.device) -> Tensor:
    num_before = segment.num_keys - segment.num_queries
    visible = torch.ones(segment.num_queries, segment.num_keys, dtype=torch.bool, device=device)
    visible.tril_(diagonal=num_before)
    if window is not None:
        visible.triu_(diagonal=num_before - window + 1)
    return visible


def _own(segments: tuple[Segment, ...], context: ContextShare) -> tuple[Segment, ...]:
    """The queries of `segments` that this context-parallel rank holds."""
    return tuple(
        Segment(s.start, min(s.end, stop), s.prefix_start, s.prefix_end, max(s.start, start))
        for start, stop in context.pieces
        for s in segments
        if max(s.start, start) < min(s.end, stop)
    )
