"""The parameters of a rank as parts of Hugging Face tensors, by the table of `weight_rules`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from simpo_megatron.convert.weight_layouts import QKV, TensorRank, WeightLayout, query_key_value_runs
from simpo_megatron.convert.weight_rules import Rule, layer_rules, model_rules
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.layers import weights_of
from simpo_megatron.mcore.lora import ADAPTER_SUFFIX, Adapter


@dataclass(frozen=True)
class Piece:
    """A part of one of this rank's parameters and where it lies in the Hugging Face folder."""

    hf_name: str
    view: Tensor
    """Elements in the order of the file's; no gradient."""
    hf_shape: tuple[int, ...]
    """Shape of these elements in the file."""
    first_row: int
    """The first row of the whole view in the tensor; above zero only in fused and stacked tensors."""
    layout: WeightLayout
    rows_of_ranks: tuple[tuple[int, int], ...] = ()
    """(first row, number of rows) in the tensor of each tensor-parallel rank, where ranks hold different numbers."""
    added: Callable[[], Tensor] | None = None
    """fp32, of `hf_shape`: what an adapter adds to these elements; None without adapter."""


def hf_tensors(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in this model's Hugging Face folder, in the order of the forward."""
    first, *last = model_rules(description)
    return shapes_by_rule([(first, None), *rules_of_layers(description), *((rule, None) for rule in last)], description)


def dtype_in_folder(name: str, description: ModelDescription, asked: torch.dtype) -> torch.dtype:
    """The dtype of the tensor `name` in a folder whose weights are of dtype `asked`.

    A router's bias stays in fp32, and in some families its weight.
    """
    names = description.names
    kept = [names.router_bias] + [f"{names.router}.weight"] * description.transformer.get("router_in_fp32", False)
    return torch.float32 if name.endswith(tuple(kept)) else asked


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
                is_part = _is_fused(rule) or rule.layout.is_stacked
                rows_so_far = shapes[name][0] if is_part and name in shapes else 0
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
        in_expert = re.fullmatch(
            r"mlp\.experts\.(?:local_experts\.(\d+)\.)?(linear_fc[12]\.(?:weight|bias))(\d*)", rest
        )
        if in_expert:
            expert = module.mlp.local_expert_indices[int(in_expert[1] or in_expert[3])]
            rest = f"mlp.experts.{in_expert[2]}"
        layer = module.layer_number - 1
        place: tuple[int | None, int | None] = (layer, expert)
        rule = _by_parameter(layer_rules(description, layer)).get(rest)
    else:
        place, rule = (None, None), _by_parameter(model_rules(description)).get(name)
    assert rule is not None, f"no rule for megatron's parameter {name} of family {description.family}"
    return rule, place


def _with_adapter(
    pieces_of_weight: list[Piece], adapter: Adapter, description: ModelDescription, tp: TensorRank
) -> list[Piece]:
    """The pieces, each with what its rows of B, laid out as the weight's, add to it."""
    rows_of_B = _views(adapter.wide_B().detach(), pieces_of_weight[0].layout, description, tp)
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
        found.append(Piece(name, view, shape, expert or 0 if rule.layout.is_stacked else first_row, rule.layout))
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
    """Names and shapes in the file."""
    return [
        (name.format(*place), rule.layout.file_shape(view, parameter))
        for name, view in zip(rule.hf_names, views, strict=True)
    ]


def _is_fused(rule: Rule) -> bool:
    return len(rule.hf_names) > 1 and len(set(rule.hf_names)) == 1


def _by_parameter(rules: tuple[Rule, ...]) -> dict[str, Rule]:
    return {name: rule for rule in rules for name in (rule.parameter, rule.te_parameter) if name}
