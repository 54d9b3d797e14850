"""The ways in which Hugging Face tensors make up a parameter of megatron-core, and how ranks divide it.

Each way is a function from a parameter to *views* of it, one per Hugging Face tensor, whose elements lie in that
tensor's own order. Loading copies a slice of the file into the view; exporting copies the view out. Both directions,
all families and any number of ranks share these functions.

Shapes: R query heads per key/value group, D head size; g groups and f feed-forward rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from simpo_megatron.mcore.families import ModelDescription


class TensorRank(NamedTuple):
    """One of the tensor-parallel ranks, and how many they are."""

    rank: int
    size: int


ALONE = TensorRank(0, 1)


def _rows_of_parameter(view: Tensor, parameter: Tensor) -> tuple[int, ...]:
    """Rows as the parameter has them, whatever dimensions the view unfolds them into."""
    rest = tuple(parameter.shape[1:])
    return (view.numel() // math.prod(rest), *rest)


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
    is_stacked: bool = False
    """True when the file has the matrices of all experts, transposed, in one tensor."""
    file_shape: Callable[[Tensor, Tensor], tuple[int, ...]] = _rows_of_parameter
    """The shape in the file of a view, the first argument, of the second."""


def _whole(parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    return (parameter,)


def _row(parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    """[n] as [1, n]."""
    return (parameter[None],)


def _shape(view: Tensor, parameter: Tensor) -> tuple[int, ...]:
    return tuple(view.shape)


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


def _transposed(parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    """[n, m] as [1, m, n], and [n] as [1, n]: one of a stack."""
    return (parameter.permute(*reversed(range(parameter.dim())))[None],)


def _interleaved(parameter: Tensor, description: ModelDescription) -> tuple[Tensor, ...]:
    """Gate above up, [2f, m] or [2f], as one of a stack: [1, m, f, 2] or [1, f, 2], each gate beside its up."""
    return _transposed(parameter.unflatten(0, (2, -1)), description)


def _one_of_stack(view: Tensor, parameter: Tensor) -> tuple[int, ...]:
    return (1, *reversed(parameter.shape))


VOCABULARY = WeightLayout(0, _whole, is_vocabulary=True)
ROWS = WeightLayout(0, _whole)
REPLICATED = WeightLayout(None, _whole)
ROW = WeightLayout(None, _row, file_shape=_shape)
COLUMNS = WeightLayout(1, _whole)
GATE_UP = WeightLayout(0, _halves)
QKV = WeightLayout(0, _query_key_value_of_each_group)
EXPERT = WeightLayout(None, _whole, is_expert=True)
EXPERT_GATE_UP = WeightLayout(None, _halves, is_expert=True)
STACKED = WeightLayout(None, _transposed, is_expert=True, is_stacked=True, file_shape=_one_of_stack)
STACKED_GATE_UP = WeightLayout(None, _interleaved, is_expert=True, is_stacked=True, file_shape=_one_of_stack)
