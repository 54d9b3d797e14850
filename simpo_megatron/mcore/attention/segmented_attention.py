"""Core attention over packs in which chosen and rejected share their prompt.

Shapes: S sequence, B batch, L queries of a segment, T keys of a segment, A attention heads, G key/value groups, R heads
of a group, D head size; heads and groups are this tensor-parallel rank's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from simpo_megatron.mcore import device
from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.attention.segments_on_cpu import attend_segments, cpu_kernel_has
from simpo_megatron.mcore.microbatch import MicrobatchLayout, Segment
from simpo_megatron.mcore.varlen_kernels import Kernel, Scores, prepare_torch, varlen_kernel


class TwoRotarySelfAttention(SelfAttention):
    """megatron's self-attention of a model whose layers with a window have a rotary embedding of their own."""

    config: ArchitectureConfig

    def __init__(
        self, config: ArchitectureConfig, submodules: Any, layer_number: int, *args: Any, **kwargs: Any
    ) -> None:
        assert config.windowed_rotary_freq is not None, "a model of two embeddings names the layers of each"
        is_windowed = config.windowed_rotary_freq[layer_number - 1]
        if is_windowed:
            # The factor of sine and cosine goes with the other layers' frequencies, which alone are scaled.
            config = copy.copy(config)
            config.yarn_mscale = 0.0
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.is_windowed = is_windowed

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        """megatron's outputs, by the frequencies [2, S, 1, 1, D] of both kinds of layers, those with a window last."""
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb[self.is_windowed], **kwargs)


class SegmentedAttention(torch.nn.Module):
    """Core attention without Transformer Engine: one call of a variable-length kernel, or one torch call per segment.

    Replaces megatron's DotProductAttention in a layer spec: same constructor, same call.

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
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        is_windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.scores = Scores(
            scale=softmax_scale,
            # megatron's window counts the keys to the left of a query; here its own key is included.
            window=config.window_size[0] + 1 if is_windowed else None,
            softcap=config.attn_logit_softcapping,
        )
        self.keeps_projection = config.qk_layernorm
        """True where norms keep the whole projection, for their inputs are slices of it."""
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_offset: torch.nn.Parameter | None = None
        """The score of each head's sink, a key without a value; under the name of megatron's core attention."""
        if config.softmax_type == "learnable":
            assert pg_collection is not None, "megatron names its groups"
            self.tp_group = pg_collection.tp
            num_heads = config.num_attention_heads // self.tp_group.size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(num_heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        if device.has_cuda():
            prepare_torch()

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

        Without a layout, or with one of padded rows, every row is causal by itself: padding is on the right, where no
        real token attends to it. Values smaller than keys are padded with zeros, as most kernels ask for.
        """
        size = value_SBGD.size(-1)
        if size < query_SBAD.size(-1):
            filled = F.pad(value_SBGD, (0, query_SBAD.size(-1) - size))
            out = self(query_SBAD, key_SBGD, filled, packed_seq_params=packed_seq_params)
            return out.unflatten(-1, (query_SBAD.size(2), -1))[..., :size].flatten(2)
        length, num_rows = query_SBAD.shape[:2]
        layout = packed_seq_params or MicrobatchLayout.of_padded_rows(length, num_rows).on(query_SBAD.device)
        scores = self.scores._replace(dropout=self.dropout if self.training else 0.0)
        if layout.context is None and self.softmax_offset is None and cpu_kernel_has(scores, query_SBAD, key_SBGD):
            return self._attend_on_cpu(query_SBAD, key_SBGD, value_SBGD, layout)
        key_TBGD, value_TBGD = layout.segment_keys(key_SBGD, value_SBGD)
        kernel = None if self.softmax_offset is not None else varlen_kernel(query_SBAD, key_TBGD, scores)
        if kernel is not None:
            return _attend_at_once(kernel, query_SBAD, key_TBGD, value_TBGD, layout)
        return _attend_by_segment(scores, query_SBAD, key_TBGD, value_TBGD, layout, self.softmax_offset)

    def _attend_on_cpu(
        self, query_SBAD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, layout: MicrobatchLayout
    ) -> Tensor:
        segments = layout.segments or (Segment(0, len(query_SBAD), 0, 0),)
        masks = [layout.added_mask(segment, self.scores.window, query_SBAD) for segment in segments]
        # A value is a slice of the layer's whole projection, which the backward would keep alive.
        value_SBGD = value_SBGD if self.keeps_projection else value_SBGD.contiguous()
        return attend_segments(query_SBAD, key_SBGD, value_SBGD, segments, masks, self.scores.scale)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The sinks with their place in the whole, as megatron's dist_checkpointing asks for them; else nothing."""
        if self.softmax_offset is None:
            return {}
        assert metadata is not None, "megatron hands its groups on"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _attend_at_once(
    kernel: Kernel, query_SBAD: Tensor, key_TBGD: Tensor, value_TBGD: Tensor, layout: MicrobatchLayout
) -> Tensor:
    """[S, B, A*D] by one call for all segments of all sequences, concatenated."""
    assert layout.lengths is not None, "of_pack and of_padded_rows make layouts"
    lengths, (length, num_rows) = layout.lengths, query_SBAD.shape[:2]
    out_QAD = kernel(
        *(x.transpose(0, 1).flatten(0, 1) for x in (query_SBAD, key_TBGD, value_TBGD)),
        lengths.cu_seqlens_q,
        lengths.cu_seqlens_kv,
        lengths.max_seqlen_q,
        lengths.max_seqlen_kv,
    )
    return out_QAD.view(num_rows, length, -1).transpose(0, 1).contiguous()


def _attend_by_segment(
    scores: Scores,
    query_SBAD: Tensor,
    key_TBGD: Tensor,
    value_TBGD: Tensor,
    layout: MicrobatchLayout,
    sinks_A: Tensor | None,
) -> Tensor:
    """[S, B, A*D] by one call per segment, with no mask over the pack."""
    segments = layout.segments or (Segment(0, len(query_SBAD), 0, 0),)
    num_keys = [s.num_keys for s in segments]
    parts = zip(
        segments,
        query_SBAD.split([s.num_queries for s in segments]),
        key_TBGD.split(num_keys),
        value_TBGD.split(num_keys),
        strict=True,
    )
    outputs = [
        _attend(scores, query, key, value, layout.mask(segment, scores.window, query.device), sinks_A)
        for segment, query, key, value in parts
    ]
    out_BASD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out_BASD.permute(2, 0, 1, 3).flatten(2)


def _attend(
    scores: Scores,
    query_LBAD: Tensor,
    key_TBGD: Tensor,
    value_TBGD: Tensor,
    mask_LT: Tensor | None,
    sinks_A: Tensor | None,
) -> Tensor:
    """[B, A, L, D] of one segment."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_LBAD, key_TBGD, value_TBGD))
    if scores.softcap is not None or sinks_A is not None:
        return _written_out_attention(query, key, value, mask_LT, scores, sinks_A)
    num_heads, num_groups = query.size(1), key.size(1)
    if num_heads != num_groups and query.device.type != "cpu":
        # On a GPU the memory-efficient kernel takes no grouped heads, and FlashAttention no mask and no fp32. Without
        # either kernel torch would write out all scores.
        key, value = (x.repeat_interleave(num_heads // num_groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_LT,
        is_causal=mask_LT is None,
        dropout_p=scores.dropout,
        scale=scores.scale,
        enable_gqa=num_heads != key.size(1),
    )


def _written_out_attention(
    query_BALD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    mask_LT: Tensor | None,
    scores: Scores,
    sinks_A: Tensor | None,
) -> Tensor:
    """[B, A, L, D], with soft-capped scores or with sinks, which no torch kernel has; scores in fp32 at least.

    A sink is a key that every query of a head sees with the same score, and whose value is zero.

    Source: transformers.models.gemma2.modeling_gemma2.eager_attention_forward and that of gpt_oss.
    """
    num_queries, size = query_BALD.shape[2:]
    if mask_LT is None:
        mask_LT = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query_BALD.device).tril_()
    scaled = query_BALD * (size**-0.5 if scores.scale is None else scores.scale)
    scores_BGRLT = scaled.unflatten(1, (key_BGTD.size(1), -1)) @ key_BGTD[:, :, None].transpose(-1, -2)
    scores_BGRLT = scores_BGRLT.to(torch.promote_types(scores_BGRLT.dtype, torch.float32))
    if scores.softcap is not None:
        scores_BGRLT = scores.softcap * torch.tanh(scores_BGRLT / scores.softcap)
    scores_BGRLT = scores_BGRLT.masked_fill(~mask_LT, -torch.inf)
    if sinks_A is None:
        weights_BGRLT = scores_BGRLT.softmax(dim=-1)
    else:
        sinks_GR11 = sinks_A.to(scores_BGRLT.dtype).view(*scores_BGRLT.shape[1:3], 1, 1)
        with_sink = torch.cat((scores_BGRLT, sinks_GR11.expand(*scores_BGRLT.shape[:-1], 1)), dim=-1)
        weights_BGRLT = with_sink.softmax(dim=-1)[..., :-1]
    weights_BGRLT = F.dropout(weights_BGRLT, scores.dropout).to(value_BGTD.dtype)
    return (weights_BGRLT @ value_BGTD[:, :, None]).flatten(1, 2)
