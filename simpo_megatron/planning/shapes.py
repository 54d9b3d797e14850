"""The inputs of a plan: the shape of a model, and how full a pack is."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from simpo_megatron.config.sections import BatchConfig
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.latent_sizes import LatentSizes


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that determine memory and time, under megatron's names."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the MLP that a token meets: of an MoE, of its chosen experts together."""
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    latent: LatentSizes | None = None
    """Multi-head latent attention."""
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    attention_output_bias: bool = False
    qk_layernorm: bool = False
    post_layernorms: bool = False
    """Norms on what attention and MLP add to the residual, too."""
    attn_logit_softcapping: float | None = None
    """Attention scores are capped, and so written out."""
    gated_linear_unit: bool = True
    """The MLP has a third matrix, whose outputs multiply those of the first."""
    fuses_activation: bool = True
    """On a GPU: megatron has a fused kernel of SwiGLU and of no other gated unit."""
    tied: bool = False
    num_moe_experts: int = 0
    """Experts of an MoE layer; 0 for a dense MLP."""
    moe_router_topk: int = 1
    """Experts that a token meets."""
    moe_ffn_hidden_size: int = 0
    """Width of one of them."""
    shared_expert_size: int = 0
    """Width of the experts that every token passes; ranks divide them as they do a dense MLP."""
    num_dense_layers: int = 0
    """Layers of an MoE that have an MLP in the place of experts. A rank is planned as if they had experts, too."""
    dense_ffn_size: int = 0
    """Width of that MLP."""

    @classmethod
    def of(cls, description: ModelDescription) -> ModelShape:
        """The shape of a model that config.json describes."""
        keys = (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "add_bias_linear",
            "add_qkv_bias",
            "qk_layernorm",
            "gated_linear_unit",
        )
        num_chosen = description.transformer.get("moe_router_topk", 1)
        num_experts = description.transformer.get("num_moe_experts", 0)
        shared = description.transformer.get("moe_shared_expert_intermediate_size", 0)
        num_dense = sum(not description.is_moe_layer(layer) for layer in range(description.transformer["num_layers"]))
        width = description.transformer.get("moe_ffn_hidden_size", description.transformer["ffn_hidden_size"])
        return cls(
            **{key: description.transformer[key] for key in keys},
            ffn_hidden_size=num_chosen * width + shared,
            moe_ffn_hidden_size=width if num_experts else 0,
            shared_expert_size=shared,
            num_moe_experts=num_experts,
            moe_router_topk=num_chosen,
            num_dense_layers=num_dense if num_experts else 0,
            dense_ffn_size=description.transformer["ffn_hidden_size"] if num_experts else 0,
            latent=description.transformer.get("latent"),
            attention_output_bias=description.transformer.get("attention_output_bias", False),
            post_layernorms=description.transformer.get("post_layernorms", False),
            attn_logit_softcapping=description.transformer.get("attn_logit_softcapping"),
            fuses_activation=description.transformer["activation_func"] is F.silu
            and description.transformer["gated_linear_unit"],
            vocab_size=description.vocab_size,
            tied=description.gpt["share_embeddings_and_output_weights"],
        )

    @property
    def head_size(self) -> int:
        """Size of a query or key, to which a smaller value is filled up."""
        return self.kv_channels if self.latent is None else self.latent.query_size

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_size

    @property
    def value_size(self) -> int:
        """Width of the values that all query heads sum."""
        return self.num_attention_heads * (self.kv_channels if self.latent is None else self.latent.v_head_dim)

    @property
    def key_size(self) -> int:
        """Width of all keys; the values' is the same."""
        return self.num_query_groups * self.head_size

    def key_size_of_rank(self, tensor_ranks: int) -> float:
        """Width of the keys of one tensor-parallel rank; ranks that share a key/value group have a copy of it each."""
        return max(self.key_size / tensor_ranks, self.head_size)

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP or an expert: up and down, and the gate's."""
        return 3 if self.gated_linear_unit else 2

    @property
    def attention_matrices(self) -> int:
        """Weights of a layer's query, key, value and output matrices, over all tensor-parallel ranks."""
        if self.latent is None:
            return self.hidden_size * (2 * self.query_size + 2 * self.key_size)
        sizes, heads = self.latent, self.num_attention_heads
        queries = self.query_size * (sizes.q_lora_rank or self.hidden_size)
        keys_and_values = sizes.kv_lora_rank * heads * (sizes.qk_head_dim + sizes.v_head_dim)
        return self.down_projections + queries + keys_and_values + heads * sizes.v_head_dim * self.hidden_size

    @property
    def down_projections(self) -> int:
        """Weights of a layer's matrices that make latents, of which each tensor-parallel rank has a copy."""
        return self.hidden_size * self.latent_width

    @property
    def latent_width(self) -> int:
        """Width of the latents of a token and of the part of its key that turns; 0 in plain attention."""
        if self.latent is None:
            return 0
        return (self.latent.q_lora_rank or 0) + self.latent.kv_lora_rank + self.latent.qk_pos_emb_head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer's matrices that one token meets, an MoE's router apart."""
        return self.attention_matrices + self.mlp_matrices * self.hidden_size * self.ffn_hidden_size

    @property
    def expert_matrices(self) -> int:
        """Weights of all experts of a layer."""
        return self.num_moe_experts * self.mlp_matrices * self.hidden_size * self.moe_ffn_hidden_size

    @property
    def divided_matrices(self) -> int:
        """Weights of a layer's matrices that are sharded over tensor-parallel ranks: all but those of experts."""
        copied = self.down_projections
        if not self.num_moe_experts:
            return self.layer_matrices - copied
        return self.attention_matrices - copied + self.mlp_matrices * self.hidden_size * self.shared_expert_size

    @property
    def router(self) -> int:
        """Weights of a layer's router, which every rank has."""
        return self.num_moe_experts * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, norms and biases apart (below a thousandth)."""
        every = self.divided_matrices + self.down_projections + self.expert_matrices + self.router
        less = every - self._dense_layer
        return self.num_layers * every - self.num_dense_layers * less + self._tables

    @property
    def num_active_parameters(self) -> int:
        """The share of these weights that one token meets."""
        return self.num_active_weights + self._tables

    @property
    def num_active_weights(self) -> int:
        """These without the tables of the vocabulary."""
        every = self.layer_matrices + self.router
        return self.num_layers * every - self.num_dense_layers * (every - self._dense_layer)

    @property
    def _dense_layer(self) -> int:
        """Weights of the matrices of an MoE's layer without experts."""
        return self.attention_matrices + self.mlp_matrices * self.hidden_size * self.dense_ffn_size

    @property
    def _tables(self) -> int:
        return (1 if self.tied else 2) * self.vocab_size * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One microbatch of pairs of one length."""

    tokens: int
    """Tokens of the microbatch, S."""
    prompt: float
    """Mean tokens of a prompt."""
    response: float
    """Mean tokens of one response; a pair has two."""
    prefix_sharing: bool = True
    """True when a pair's prompt is in the pack once, not once for each response."""

    @classmethod
    def of(cls, batch: BatchConfig, *, prompt: float, response: float) -> Pack:
        """The microbatch that `batch` makes of pairs of these lengths: full, or of so many pairs."""
        sharing = batch.prefix_sharing
        pair = cls(tokens=0, prompt=prompt, response=response, prefix_sharing=sharing).pair_tokens
        tokens = batch.tokens_per_microbatch if batch.packing else round(batch.micro_batch_size * pair)
        return cls(tokens=tokens, prompt=prompt, response=response, prefix_sharing=sharing)

    @property
    def pair_tokens(self) -> float:
        """Tokens that a pair takes of a pack."""
        return (1 if self.prefix_sharing else 2) * self.prompt + 2 * self.response

    @property
    def num_pairs(self) -> float:
        return self.tokens / self.pair_tokens

    @property
    def response_rows(self) -> float:
        """Rows that predict a response token, N: the only ones that meet the vocabulary."""
        return self.num_pairs * 2 * self.response

    @property
    def repeated_keys(self) -> float:
        """Keys of prompts that are gathered a second time, for the rejected response."""
        return self.num_pairs * self.prompt if self.prefix_sharing else 0.0

    @property
    def scores(self) -> float:
        """Pairs of a query and a key of its segment, seen or not."""
        whole = self.prompt + self.response
        return self.num_pairs * whole * (whole + (self.response if self.prefix_sharing else whole))

    @property
    def attended(self) -> float:
        """Pairs of a query and a key that it sees, causally."""
        whole = self.prompt + self.response
        second = self.response * (self.prompt + self.response / 2) if self.prefix_sharing else whole**2 / 2
        return self.num_pairs * (whole**2 / 2 + second)
