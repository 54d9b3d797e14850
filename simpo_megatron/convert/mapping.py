"""The table of names and layouts between Hugging Face folders and megatron-core's parameters.

A megatron parameter is one or more Hugging Face tensors, joined in one of a few ways and sharded over
tensor-parallel ranks. Each way is a function from a parameter to *views* of it, one per Hugging Face tensor,
whose elements lie in that tensor's own order. Loading copies a slice of the file into the view; exporting copies
the view out. Both directions, all families and any number of ranks share these functions.

Shapes: R query heads per key/value group, D head size; g groups and f feed-forward rows of this rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from simpo_megatron.mcore.experts import ROUTER_BIAS, weights_of
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.lora import ADAPTER_SUFFIX, Adapter


class TensorRank(NamedTuple):
    """One of the tensor-parallel ranks, and how many they are."""

    rank: int
    size: int


ALONE = TensorRank(0, 1)


@dataclass(frozen=True)
class WeightLayout:
    """The Hugging Face tensors that make up one megatron parameter, and how."""

    cut: int | None
    """Dimension along which ranks hold consecutive slices of each tensor; None: all ranks hold all of it."""
    views: Callable[[Tensor, ModelDescription], tuple[Tensor, ...]]
    """Views of a parameter (or of this rank's slice), one per Hugging Face tensor."""
    is_vocabulary: bool = False
    """Rows past the true vocabulary exist in megatron only: zero on the way in, dropped on the way out."""
    is_expert: bool = False
    """One parameter for each expert of an MoE; expert-parallel ranks hold different ones, each of them whole."""


def _whole(parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    return (parameter,)


def _halves(parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    """[2f, ...] as gate [f, ...] and up [f, ...]: every rank holds its gate slice above its up slice."""
    return parameter.chunk(2)


def _query_key_value_of_each_group(parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    """[g*(R+2)*D, ...] as query [g, R, D, ...], key [g, 1, D, ...], value [g, 1, D, ...]."""
    arguments = description.transformer
    num_queries = arguments["num_attention_heads"] // arguments["num_query_groups"]
    grouped = parameter.unflatten(0, (-1, num_queries + 2, arguments["kv_channels"]))
    return grouped.split((num_queries, 1, 1), dim=1)


class Run(NamedTuple):
    """Consecutive rows of a parameter that are consecutive rows of a Hugging Face tensor; maybe none."""

    start: int
    """First row of the parameter."""
    first_row: int
    """First row of the tensor."""
    num_rows: int


def query_key_value_runs(description: ModelDescription, tp: TensorRank) -> tuple[Run, Run, Run]:
    """The rows of query, key and value that a rank holds, where ranks are more than key/value groups.

    megatron splits the rows of linear_qkv evenly, also inside a group, and gathers a group's activations from the
    ranks that share it. A rank's rows belong to one group: to its query, key, value, or two or three of these.
    """
    arguments = description.transformer
    num_groups, head_dim = arguments["num_query_groups"], arguments["kv_channels"]
    query_rows = arguments["num_attention_heads"] // num_groups * head_dim
    rows_of_group = query_rows + 2 * head_dim
    rows_of_rank = num_groups * rows_of_group // tp.size
    group, first = divmod(tp.rank * rows_of_rank, rows_of_group)
    runs, before = [], 0
    for num_rows in (query_rows, head_dim, head_dim):
        start, stop = max(first, before), min(first + rows_of_rank, before + num_rows)
        is_here = start < stop
        runs.append(Run(start - first, group * num_rows + start - before, stop - start) if is_here else Run(0, 0, 0))
        before += num_rows
    return runs[0], runs[1], runs[2]


VOCABULARY = WeightLayout(0, _whole, is_vocabulary=True)
ROWS = WeightLayout(0, _whole)
REPLICATED = WeightLayout(None, _whole)
COLUMNS = WeightLayout(1, _whole)
GATE_UP = WeightLayout(0, _halves)
QKV = WeightLayout(0, _query_key_value_of_each_group)
EXPERT = WeightLayout(None, _whole, is_expert=True)
EXPERT_GATE_UP = WeightLayout(None, _halves, is_expert=True)


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


@dataclass(frozen=True)
class Piece:
    """A part of one of this rank's parameters and where it lies in the Hugging Face folder."""

    hf_name: str
    view: Tensor
    """Elements in the order of the file's; no gradient."""
    hf_shape: tuple[int, ...]
    """Shape of these elements in the file."""
    first_row: int
    """Where the whole view's rows start in the tensor; above zero in fused tensors only."""
    layout: WeightLayout
    rows_of_ranks: tuple[tuple[int, int], ...] = ()
    """(first row, number of rows) in the tensor of each tensor-parallel rank, where ranks hold different numbers."""
    added: Callable[[], Tensor] | None = None
    """fp32, of `hf_shape`: what an adapter adds to these elements; None without adapter."""


_Row = tuple[str, tuple[str, ...], WeightLayout, tuple[int, ...], str | None]
"""A Rule of a layer without what all names have in common."""


def _model_rules(description: ModelDescription) -> tuple[Rule, ...]:
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
    arguments = description.transformer
    hidden, head_dim = arguments["hidden_size"], arguments["kv_channels"]
    num_heads, num_groups = arguments["num_attention_heads"], arguments["num_query_groups"]
    qkv_rows, query_rows = (num_heads + 2 * num_groups) * head_dim, num_heads * head_dim
    norm, has_post_norms, names = (hidden,), arguments.get("post_layernorms", False), description.names
    qkv = names.query_key_value
    table: list[_Row] = [
        (
            "input_layernorm.weight",
            ("input_layernorm",),
            REPLICATED,
            norm,
            "self_attention.linear_qkv.layer_norm_weight",
        ),
        ("self_attention.linear_qkv.weight", qkv, QKV, (qkv_rows, hidden), None),
        ("self_attention.linear_proj.weight", (names.attention_output,), COLUMNS, (hidden, query_rows), None),
        ("pre_mlp_layernorm.weight", (names.pre_mlp_norm,), REPLICATED, norm, "mlp.linear_fc1.layer_norm_weight"),
    ]
    if arguments["add_bias_linear"] or arguments["add_qkv_bias"]:
        table.append(("self_attention.linear_qkv.bias", qkv, QKV, (qkv_rows,), None))
    if arguments["add_bias_linear"] or arguments.get("attention_output_bias"):
        table.append(("self_attention.linear_proj.bias", (names.attention_output,), REPLICATED, norm, None))
    if arguments["qk_layernorm"]:
        table += [
            ("self_attention.q_layernorm.weight", ("self_attn.q_norm",), REPLICATED, (head_dim,), None),
            ("self_attention.k_layernorm.weight", ("self_attn.k_norm",), REPLICATED, (head_dim,), None),
        ]
    table += _expert_rows(description) if description.is_moe_layer(layer) else _mlp_rows(description)
    if has_post_norms:
        after_attention, after_mlp = (names.post_attention_norm,), (names.post_mlp_norm,)
        table += [
            ("self_attention.linear_proj.post_layernorm.weight", after_attention, REPLICATED, norm, None),
            ("mlp.linear_fc2.post_layernorm.weight", after_mlp, REPLICATED, norm, None),
        ]
    return tuple(
        Rule(
            parameter,
            tuple(f"model.layers.{{}}.{name}{_suffix_in_hf(parameter)}" for name in names),
            layout,
            shape,
            te_name,
        )
        for parameter, names, layout, shape, te_name in table
    )


def _suffix_in_hf(parameter: str) -> str:
    """The suffix .weight or .bias, shared with the Hugging Face name; empty where megatron's name differs."""
    last = parameter.rpartition(".")[2]
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
    gate, up, down = (names.expert + matrix for matrix in names.expert_matrices)
    table: list[_Row] = [
        ("mlp.router.weight", (names.router,), REPLICATED, (arguments["num_moe_experts"], hidden), None),
        ("mlp.experts.linear_fc1.weight", (gate, up), EXPERT_GATE_UP, (2 * width, hidden), None),
        ("mlp.experts.linear_fc2.weight", (down,), EXPERT, (hidden, width), None),
    ]
    if arguments.get("moe_router_enable_expert_bias"):
        table.append((ROUTER_BIAS, (names.router_bias,), REPLICATED, (arguments["num_moe_experts"],), None))
    shared_width = arguments.get("moe_shared_expert_intermediate_size")
    if shared_width is not None:
        gate, up, down = (names.shared_expert + matrix for matrix in names.expert_matrices)
        table += [
            ("mlp.shared_experts.linear_fc1.weight", (gate, up), GATE_UP, (2 * shared_width, hidden), None),
            ("mlp.shared_experts.linear_fc2.weight", (down,), COLUMNS, (hidden, shared_width), None),
        ]
    if arguments.get("moe_shared_expert_gate"):
        table.append(("mlp.shared_experts.gate_weight", (names.shared_expert_gate,), REPLICATED, (1, hidden), None))
    return table


def hf_tensors(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in this model's Hugging Face folder, in the order of the forward."""
    first, *last = _model_rules(description)
    return shapes_by_rule([(first, None), *rules_of_layers(description), *((rule, None) for rule in last)], description)


def dtype_in_folder(name: str, description: ModelDescription, asked: torch.dtype) -> torch.dtype:
    """The dtype of the tensor `name` in a folder whose weights are of dtype `asked`: a router's bias stays in fp32."""
    return torch.float32 if name.endswith(description.names.router_bias) else asked


def rules_of_layers(description: ModelDescription) -> list[tuple[Rule, int]]:
    """(rule, layer counted from zero) for all layers of the model."""
    return [
        (rule, layer)
        for layer in range(description.transformer["num_layers"])
        for rule in layer_rules(description, layer)
    ]


def shapes_by_rule(
    placed: Iterable[tuple[Rule, int | None]], description: ModelDescription
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor that rules, each with its layer or None, make up."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule, layer in placed:
        whole = torch.empty(rule.shape, device="meta")
        for expert in _experts_of(rule, description):
            for name, shape in _named_shapes(rule, (layer, expert), rule.layout.views(whole, description), whole):
                rows_so_far = shapes[name][0] if _is_fused(rule) and name in shapes else 0
                shapes[name] = (rows_so_far + shape[0], *shape[1:])
    return shapes


def _experts_of(rule: Rule, description: ModelDescription) -> Iterable[int | None]:
    return range(description.transformer["num_moe_experts"]) if rule.layout.is_expert else (None,)


def pieces(
    chunk: torch.nn.Module,
    description: ModelDescription,
    *,
    tp: TensorRank,
    in_place_of: Mapping[Tensor, Tensor] | None = None,
) -> list[Piece]:
    """Every parameter of this rank's GPTModel `chunk`, as the parts of the Hugging Face tensors it holds.

    `in_place_of` names the tensors that stand for some parameters, those kept in FP8.
    A tied head on a last pipeline stage counts as the embedding. An adapter is not a piece: it comes with the pieces
    that it adds to.
    """
    adapters = {name: module for name, module in chunk.named_modules() if isinstance(module, Adapter)}
    found = []
    for name, parameter in weights_of(chunk):
        if name.rpartition(".")[0] in adapters:
            continue
        values = (in_place_of or {}).get(parameter, parameter.detach())
        own = pieces_of(chunk, name, values, description, tp=tp)
        adapter = adapters.get(name.removesuffix(".weight") + ADAPTER_SUFFIX)
        found += own if adapter is None else _with_adapter(own, adapter, description, tp)
    return found


def pieces_of(
    chunk: torch.nn.Module, name: str, values: Tensor, description: ModelDescription, *, tp: TensorRank
) -> list[Piece]:
    """The same of one parameter of `chunk`, whose `values` need not be those that the chunk holds."""
    rule, (layer, expert) = _place_of(chunk, name, description)
    return pieces_by_rule(values, rule, layer, description, tp, expert)


def stage_tensors(chunk: torch.nn.Module, description: ModelDescription) -> set[str]:
    """Names of the Hugging Face tensors that the ranks of this `chunk`'s stage hold together."""
    found = set()
    for name, _ in weights_of(chunk):
        if ADAPTER_SUFFIX + "." not in name:
            rule, (layer, _) = _place_of(chunk, name, description)
            found |= {hf.format(layer, expert) for expert in _experts_of(rule, description) for hf in rule.hf_names}
    return found


def layers_of(chunk: torch.nn.Module) -> Any:
    """The transformer layers of a chunk, in order."""
    return cast(Any, chunk).decoder.layers


def _place_of(
    chunk: torch.nn.Module, name: str, description: ModelDescription
) -> tuple[Rule, tuple[int | None, int | None]]:
    """The rule of a parameter, and the layer and expert of the whole model it belongs to."""
    in_layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if in_layer:
        module, rest, expert = layers_of(chunk)[int(in_layer[1])], in_layer[2], None
        # The second form is Transformer Engine's, with all experts of a rank in one module.
        in_expert = re.fullmatch(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?(linear_fc[12]\.weight)(\d*)", rest)
        if in_expert:
            expert = module.mlp.local_expert_indices[int(in_expert[1] or in_expert[3])]
            rest = f"mlp.experts.{in_expert[2]}"
        layer = module.layer_number - 1
        place: tuple[int | None, int | None] = (layer, expert)
        rule = _by_parameter(layer_rules(description, layer)).get(rest)
    else:
        place, rule = (None, None), _by_parameter(_model_rules(description)).get(name)
    assert rule is not None, f"no rule for megatron's parameter {name} of family {description.family}"
    return rule, place


def _with_adapter(
    pieces_of_weight: list[Piece], adapter: Adapter, description: ModelDescription, tp: TensorRank
) -> list[Piece]:
    """The pieces, each with what its rows of B, laid out as the weight's, add to it."""
    rows_of_B = _views(adapter.lora_B.detach(), pieces_of_weight[0].layout, description, tp)
    return [
        replace(piece, added=partial(adapter.added_weight, rows))
        for piece, rows in zip(pieces_of_weight, rows_of_B, strict=True)
    ]


def pieces_by_rule(
    parameter: Tensor,
    rule: Rule,
    layer: int | None,
    description: ModelDescription,
    tp: TensorRank,
    expert: int | None = None,
) -> list[Piece]:
    """This rank's `parameter` of `rule` as parts of Hugging Face tensors."""
    views = _views(parameter, rule.layout, description, tp)
    named = _named_shapes(rule, (layer, expert), views, parameter)
    if _splits_groups(rule.layout, description, tp):
        of_ranks = [query_key_value_runs(description, TensorRank(rank, tp.size)) for rank in range(tp.size)]
        num_rows = [sum(runs[part].num_rows for runs in of_ranks) for part in range(3)]
        starts = accumulate(num_rows[:-1], initial=0) if _is_fused(rule) else (0, 0, 0)
        rows = [
            tuple((start + runs[part].first_row, runs[part].num_rows) for runs in of_ranks)
            for part, start in enumerate(starts)
        ]
        return [
            Piece(name, view, shape, 0, rule.layout, rows_of_ranks)
            for view, (name, shape), rows_of_ranks in zip(views, named, rows, strict=True)
        ]
    found, first_row = [], 0
    for view, (name, shape) in zip(views, named, strict=True):
        found.append(Piece(name, view, shape, first_row, rule.layout))
        if _is_fused(rule):
            first_row += shape[0] * tp.size
    return found


def _splits_groups(layout: WeightLayout, description: ModelDescription, tp: TensorRank) -> bool:
    return layout is QKV and tp.size > description.transformer["num_query_groups"]


def _views(
    parameter: Tensor, layout: WeightLayout, description: ModelDescription, tp: TensorRank
) -> tuple[Tensor, ...]:
    if not _splits_groups(layout, description, tp):
        return layout.views(parameter, description)
    return tuple(parameter.narrow(0, run.start, run.num_rows) for run in query_key_value_runs(description, tp))


def _named_shapes(
    rule: Rule, place: tuple, views: tuple[Tensor, ...], parameter: Tensor
) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the file; a view has more dimensions where it unfolds the parameter's rows."""
    rest = tuple(parameter.shape[1:])
    return [
        (name.format(*place), (view.numel() // math.prod(rest), *rest))
        for name, view in zip(rule.hf_names, views, strict=True)
    ]


def _is_fused(rule: Rule) -> bool:
    return len(rule.hf_names) > 1 and len(set(rule.hf_names)) == 1


def _by_parameter(rules: tuple[Rule, ...]) -> dict[str, Rule]:
    return {name: rule for rule in rules for name in (rule.parameter, rule.te_parameter) if name}
