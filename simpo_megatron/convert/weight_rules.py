"""The table of names and layouts between Hugging Face folders and megatron-core's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from simpo_megatron.convert.weight_layouts import (
    COLUMNS,
    EXPERT,
    EXPERT_GATE_UP,
    GATE_UP,
    QKV,
    REPLICATED,
    ROW,
    ROWS,
    STACKED,
    STACKED_GATE_UP,
    VOCABULARY,
    WeightLayout,
)
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.layers import ROUTER_BIAS, has_router_bias


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    parameter: str
    """Name in megatron's local layer specification, within the model or within a layer."""
    hf_names: tuple[str, ...]
    """One per view of the layout, `{}` for the layer and then the expert, counted from zero. Equal names: one tensor,
    whose rows are the views' in turn."""
    layout: WeightLayout
    shape: tuple[int, ...]
    """The shape of the whole parameter, vocabulary unpadded."""
    te_parameter: str | None = None
    """Name in the Transformer Engine specification, where it differs."""


_Row = tuple[str, tuple[str, ...], WeightLayout, tuple[int, ...], str | None]
"""A Rule of a layer without what all names have in common."""


def model_rules(description: ModelDescription) -> tuple[Rule, ...]:
    """The rules outside the layers, the embedding first."""
    hidden_size = description.transformer["hidden_size"]
    table = (description.vocab_size, hidden_size)
    tied = description.gpt["share_embeddings_and_output_weights"]
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY, table),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), REPLICATED, (hidden_size,)),
        Rule("output_layer.weight", (head,), VOCABULARY, table),
    )


def layer_rules(description: ModelDescription, layer: int) -> tuple[Rule, ...]:
    """The rules of the transformer layer number `layer`, counted from zero."""
    arguments, names = description.transformer, description.names
    norm = (arguments["hidden_size"],)
    table: list[_Row] = [
        ("pre_mlp_layernorm.weight", (names.pre_mlp_norm,), REPLICATED, norm, "mlp.linear_fc1.layer_norm_weight"),
        *(_attention_rows if arguments.get("latent") is None else _latent_attention_rows)(description),
    ]
    table += _expert_rows(description) if description.is_moe_layer(layer) else _mlp_rows(description)
    if arguments.get("post_layernorms", False):
        after_attention, after_mlp = (names.post_attention_norm,), (names.post_mlp_norm,)
        table += [
            ("self_attention.linear_proj.post_layernorm.weight", after_attention, REPLICATED, norm, None),
            ("mlp.linear_fc2.post_layernorm.weight", after_mlp, REPLICATED, norm, None),
        ]
    return tuple(
        Rule(
            parameter,
            tuple(f"model.layers.{{}}.{name}{_suffix_in_hf(parameter, layout)}" for name in names),
            layout,
            shape,
            te_name,
        )
        for parameter, names, layout, shape, te_name in table
    )


def _attention_rows(description: ModelDescription) -> list[_Row]:
    """The rows of attention and the norm before it."""
    arguments, names = description.transformer, description.names
    hidden, head_dim = arguments["hidden_size"], arguments["kv_channels"]
    num_heads, num_groups = arguments["num_attention_heads"], arguments["num_query_groups"]
    qkv_rows, query_rows = (num_heads + 2 * num_groups) * head_dim, num_heads * head_dim
    qkv, out, before = names.query_key_value, (names.attention_output,), "self_attention.linear_qkv.layer_norm_weight"
    table: list[_Row] = [
        ("input_layernorm.weight", ("input_layernorm",), REPLICATED, (hidden,), before),
        ("self_attention.linear_qkv.weight", qkv, QKV, (qkv_rows, hidden), None),
        ("self_attention.linear_proj.weight", out, COLUMNS, (hidden, query_rows), None),
    ]
    if arguments["add_bias_linear"] or arguments["add_qkv_bias"]:
        table.append(("self_attention.linear_qkv.bias", qkv, QKV, (qkv_rows,), None))
    if arguments["add_bias_linear"] or arguments.get("attention_output_bias"):
        table.append(("self_attention.linear_proj.bias", out, REPLICATED, (hidden,), None))
    if arguments.get("softmax_type") == "learnable":
        table.append(("self_attention.core_attention.softmax_offset", (names.sinks,), ROWS, (num_heads,), None))
    if arguments["qk_layernorm"]:
        table += [
            ("self_attention.q_layernorm.weight", ("self_attn.q_norm",), REPLICATED, (head_dim,), None),
            ("self_attention.k_layernorm.weight", ("self_attn.k_norm",), REPLICATED, (head_dim,), None),
        ]
    return table


def _latent_attention_rows(description: ModelDescription) -> list[_Row]:
    """The same of multi-head latent attention."""
    arguments, sizes = description.transformer, description.transformer["latent"]
    hidden, num_heads = arguments["hidden_size"], arguments["num_attention_heads"]
    query_rows, rank = num_heads * sizes.query_size, sizes.q_lora_rank
    table: list[_Row] = [("input_layernorm.weight", ("input_layernorm",), REPLICATED, (hidden,), None)]

    def add(parameter: str, name: str, layout: WeightLayout, *shape: int) -> None:
        table.append((f"self_attention.{parameter}.weight", (f"self_attn.{name}",), layout, shape, None))

    if rank is None:
        add("linear_q_proj", "q_proj", ROWS, query_rows, hidden)
    else:
        add("linear_q_down_proj", "q_a_proj", REPLICATED, rank, hidden)
        add("q_layernorm", "q_a_layernorm", REPLICATED, rank)
        add("linear_q_up_proj", "q_b_proj", ROWS, query_rows, rank)
    down, up = sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim, num_heads * (sizes.qk_head_dim + sizes.v_head_dim)
    add("linear_kv_down_proj", "kv_a_proj_with_mqa", REPLICATED, down, hidden)
    add("kv_layernorm", "kv_a_layernorm", REPLICATED, sizes.kv_lora_rank)
    add("linear_kv_up_proj", "kv_b_proj", ROWS, up, sizes.kv_lora_rank)
    add(
        "linear_proj",
        description.names.attention_output.rpartition(".")[2],
        COLUMNS,
        hidden,
        num_heads * sizes.v_head_dim,
    )
    return table


def _suffix_in_hf(parameter: str, layout: WeightLayout) -> str:
    """The suffix .weight or .bias, shared with the Hugging Face name; empty where megatron's name differs."""
    last = parameter.rpartition(".")[2]
    if layout.is_stacked:
        return "_bias" if last == "bias" else ""
    return f".{last}" if last in ("weight", "bias") else ""


def _mlp_rows(description: ModelDescription) -> list[_Row]:
    """The rows of a dense MLP."""
    arguments, names = description.transformer, description.names
    hidden, ffn = arguments["hidden_size"], arguments["ffn_hidden_size"]
    gate_up, down = names.gate_up, (names.down,)
    layout, rows = (GATE_UP, 2 * ffn) if arguments["gated_linear_unit"] else (ROWS, ffn)
    table: list[_Row] = [
        ("mlp.linear_fc1.weight", gate_up, layout, (rows, hidden), None),
        ("mlp.linear_fc2.weight", down, COLUMNS, (hidden, ffn), None),
    ]
    if arguments["add_bias_linear"]:
        table += [
            ("mlp.linear_fc1.bias", gate_up, layout, (rows,), None),
            ("mlp.linear_fc2.bias", down, REPLICATED, (hidden,), None),
        ]
    return table


def _expert_rows(description: ModelDescription) -> list[_Row]:
    """The rows of an MoE in the place of the MLP."""
    arguments, names = description.transformer, description.names
    hidden, width = arguments["hidden_size"], arguments["moe_ffn_hidden_size"]
    num_experts, gate_up, down = arguments["num_moe_experts"], EXPERT_GATE_UP, EXPERT
    *of_first, of_second = (names.expert + matrix for matrix in names.expert_matrices)
    if names.stacked_experts is not None:
        gate_up, down = STACKED_GATE_UP, STACKED
        *of_first, of_second = names.stacked_experts
    table: list[_Row] = [
        ("mlp.router.weight", (names.router,), REPLICATED, (num_experts, hidden), None),
        ("mlp.experts.linear_fc1.weight", tuple(of_first), gate_up, (2 * width, hidden), None),
        ("mlp.experts.linear_fc2.weight", (of_second,), down, (hidden, width), None),
    ]
    if arguments["add_bias_linear"]:
        table += [
            ("mlp.router.bias", (names.router,), REPLICATED, (num_experts,), None),
            ("mlp.experts.linear_fc1.bias", tuple(of_first), gate_up, (2 * width,), None),
            ("mlp.experts.linear_fc2.bias", (of_second,), down, (hidden,), None),
        ]
    if has_router_bias(arguments):
        layout = ROW if names.router_bias_is_row else REPLICATED
        table.append((ROUTER_BIAS, (names.router_bias,), layout, (num_experts,), None))
    shared_width = arguments.get("moe_shared_expert_intermediate_size")
    if shared_width is not None:
        *of_first, of_second = (names.shared_expert + matrix for matrix in names.expert_matrices)
        table += [
            ("mlp.shared_experts.linear_fc1.weight", tuple(of_first), GATE_UP, (2 * shared_width, hidden), None),
            ("mlp.shared_experts.linear_fc2.weight", (of_second,), COLUMNS, (hidden, shared_width), None),
        ]
    if arguments.get("moe_shared_expert_gate"):
        table.append(("mlp.shared_experts.gate_weight", (names.shared_expert_gate,), REPLICATED, (1, hidden), None))
    return table
