"""Multi-head latent attention: keys and values of all heads are computed from one small vector per token.

Shapes: S sequence (this rank's part of hidden states under sequence parallelism), B batch, A attention heads of this
tensor-parallel rank, D size of a query or key, N its part without rotary embedding, P its rotated part, V size of a
value, C size of the latent.

Source: arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.microbatch import MicrobatchLayout

NORM_EPSILON = 1e-6
"""The epsilon of the norms of latents; other norms may have another one.

Source: transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention.
"""


class DuplicatedLinear(torch.nn.Linear):
    """A linear layer that is replicated over tensor-parallel ranks, with megatron's call signature."""

    def __init__(self, input_size: int, output_size: int, *, config: ArchitectureConfig) -> None:
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype)
        # Under sequence parallelism each rank sees its own tokens only: finalize_model_grads sums over tp by this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron's own mark

    def reset_parameters(self) -> None:
        """Leave the values as they are: a folder or a checkpoint has them."""

    def forward(self, input_SBI: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # megatron's way
        """(output [S, B, O], no bias)."""
        return super().forward(input_SBI), None


@dataclass
class LatentAttentionSubmodules:
    """The parts of a LatentAttention, as megatron's specifications hold them."""

    linear: Any
    """A column-parallel layer."""
    linear_proj: Any
    norm: Any
    core_attention: Any


class LatentAttention(Attention):
    """megatron's MLASelfAttention with the same parameter names, for packs and any rotary embedding.

    megatron's own rotates queries and keys by the index of a token in its row, but in a pack sequences share a row.
    """

    config: ArchitectureConfig

    def __init__(
        self,
        config: ArchitectureConfig,
        submodules: LatentAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **options: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", **options)
        assert config.latent is not None, "only models with latents have this layer"
        sizes = self.sizes = config.latent
        hidden, num_heads = config.hidden_size, config.num_attention_heads

        def norm(size: int) -> torch.nn.Module:
            return submodules.norm(config=config, hidden_size=size, eps=NORM_EPSILON)

        def column_parallel(input_size: int, output_size: int, name: str) -> torch.nn.Module:
            return submodules.linear(
                input_size,
                output_size,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name=name,
                tp_group=self.tp_group,
            )

        if sizes.q_lora_rank is None:
            self.linear_q_proj = column_parallel(hidden, num_heads * sizes.query_size, "q_proj")
        else:
            self.linear_q_down_proj = DuplicatedLinear(hidden, sizes.q_lora_rank, config=config)
            self.q_layernorm = norm(sizes.q_lora_rank)
            self.linear_q_up_proj = column_parallel(sizes.q_lora_rank, num_heads * sizes.query_size, "q_up_proj")
        down = sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim
        self.linear_kv_down_proj = DuplicatedLinear(hidden, down, config=config)
        self.kv_layernorm = norm(sizes.kv_lora_rank)
        up = num_heads * (sizes.qk_head_dim + sizes.v_head_dim)
        self.linear_kv_up_proj = column_parallel(sizes.kv_lora_rank, up, "kv_up_proj")

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(query [S, B, A, D], key [S, B, A, D], value [S, B, A, V]) of all tokens, this rank's heads.

        Collectives, over tp: those of the column-parallel layers, and for the part of the keys that turns, which all
        heads share, a gather along the sequence or, in the backward, an all-reduce.
        """
        sizes = self.sizes
        if sizes.q_lora_rank is None:
            query = self.linear_q_proj(hidden_states)[0]
        else:
            query = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)[0]))[0]
        query_SBAD = query.unflatten(-1, (-1, sizes.query_size))
        latent_SBC, turning_SBP = self.linear_kv_down_proj(hidden_states)[0].split(
            (sizes.kv_lora_rank, sizes.qk_pos_emb_head_dim), dim=-1
        )
        both = self.linear_kv_up_proj(self.kv_layernorm(latent_SBC.contiguous()))[0]
        key_SBAN, value_SBAV = both.unflatten(-1, (-1, sizes.qk_head_dim + sizes.v_head_dim)).split(
            (sizes.qk_head_dim, sizes.v_head_dim), dim=-1
        )
        if self.config.sequence_parallel:
            turning_SBP = gather_from_sequence_parallel_region(turning_SBP, group=self.tp_group)
        else:
            turning_SBP = copy_to_tensor_model_parallel_region(turning_SBP, group=self.tp_group)
        still_SBAN, turned_SBAP = query_SBAD.split((sizes.qk_head_dim, sizes.qk_pos_emb_head_dim), dim=-1)
        turned_SBAP = self._turned(turned_SBAP, rotary_pos_emb)
        key_SBAP = self._turned(turning_SBP[:, :, None], rotary_pos_emb).expand_as(turned_SBAP)
        return torch.cat((still_SBAN, turned_SBAP), dim=-1), torch.cat((key_SBAN, key_SBAP), dim=-1), value_SBAV

    def _turned(self, heads: Tensor, rotary_pos_emb: Tensor) -> Tensor:
        """The heads [S, B, ..., P], rotated by their positions."""
        return apply_rotary_pos_emb(
            heads, rotary_pos_emb, self.config, mscale=_yarn_get_concentration_factor_from_config(self.config)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: MicrobatchLayout | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [S, B, H], no bias), as megatron's layers call it."""
        query, key, value = self.get_query_key_value_tensors(hidden_states, rotary_pos_emb)
        again = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if again else self.core_attention
        options = {"attn_mask_type": self.attn_mask_type, "packed_seq_params": packed_seq_params}
        return self.linear_proj(attend(query, key, value, attention_mask, **options))
