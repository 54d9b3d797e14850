"""Low-rank adapters (LoRA) beside megatron's parallel linear layers: y = W x + scale * B A x, W frozen.

Of a column-parallel layer, A is replicated over tp and B is divided with the layer's outputs; of a row-parallel
layer, A is divided with the layer's inputs and B is replicated. What crosses ranks is then always A x, of width r,
never an activation of the model's width. linear_qkv and linear_fc1 share one A among query, key and value (gate and
up) because megatron joins them in one layer; their B has the rows of the layer's weight, in its order. Where the parts
are targets of their own, as in PEFT, A holds the A of each below the other, and a row of B meets that of its part.

An adapter adds to its layer's output in a forward hook. So the layer stays megatron's or Transformer Engine's own, with
unchanged parameter names. The adapter is a sibling module of the layer.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, I and O this rank's inputs and outputs of
the layer, r rank, p parts with an A of their own, 1 where all share one.

Source: arXiv 2106.09685, equation 3 and section 4.1.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron.config.lora_section import OF_LATENT_ATTENTION, LoRAConfig

ADAPTER_SUFFIX = "_adapter"
"""Suffix of an adapter's name after its layer's."""


class Adapter(torch.nn.Module):
    """A [p r, I] and B [O, r] of one layer, and what both kinds of layers have in common."""

    divided: str | None
    """The name of the one of the two that is sharded over tp, along its longer dimension; None: neither is."""
    parts_Op: Tensor | None

    def __init__(
        self,
        weight_OI: Tensor,
        settings: LoRAConfig,
        *,
        tp_group: ProcessGroup,
        sequence_parallel: bool,
        is_gated: bool,
        draw: torch.Generator,
        parts_Op: Tensor | None = None,
    ) -> None:
        """Parameters in the dtype of `weight_OI`: B zero, A as `initial_A` draws it.

        Args:
            is_gated: the rows of B are [gate, up].
            parts_Op: bool, the part that each row of B belongs to, none for rows that get nothing; None: one for all.
        """
        super().__init__()
        num_outputs, num_inputs = weight_OI.shape
        rank = settings.lora_rank
        assert rank is not None, "adapters without a rank"
        self.scale, self.dropout = settings.scale, settings.lora_dropout
        self.tp_group, self.sequence_parallel, self.is_gated = tp_group, sequence_parallel, is_gated
        dtype, here = weight_OI.dtype, weight_OI.device
        self.register_buffer("parts_Op", None if parts_Op is None else parts_Op.to(here, dtype), persistent=False)
        num_parts = 1 if parts_Op is None else parts_Op.shape[1]
        self.lora_A = torch.nn.Parameter(torch.empty(num_parts * rank, num_inputs, dtype=dtype, device=here))
        self.lora_B = torch.nn.Parameter(torch.empty(num_outputs, rank, dtype=dtype, device=here))
        self.draw_weights(draw)
        for name, parameter in self.named_parameters():
            if name == self.divided:
                set_tensor_model_parallel_attributes(parameter, True, self._divided_dimension, 1)
            else:
                # Under sequence parallelism a rank sees only its own tokens; finalize_model_grads sums marked ones.
                parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]  # megatron's own mark

    @torch.no_grad()
    def draw_weights(self, draw: torch.Generator) -> None:
        """Set the weights that training starts from: B zero, A as `initial_A` draws it, this rank's part of it."""
        num_rows, num_inputs = self.lora_A.shape
        if self.lora_A.is_meta:
            return
        whole_A = initial_A(num_rows, num_inputs * (self.tp_group.size() if self.divided == "lora_A" else 1), draw)
        first = self.tp_group.rank() * num_inputs if self.divided == "lora_A" else 0
        self.lora_A.copy_(whole_A[:, first : first + num_inputs])
        self.lora_B.zero_()

    @property
    def _divided_dimension(self) -> int:
        return 0 if self.divided == "lora_B" else 1

    def add_to(
        self, layer: torch.nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's forward hook: its (output, bias) with the adapter's share in the output."""
        output, bias = outputs
        return self(inputs[0], output), bias

    def wide_B(self) -> Tensor:
        """[O, p r]: each row of B in the columns of its part's A, zero in the others."""
        if self.parts_Op is None:
            return self.lora_B
        return (self.parts_Op[:, :, None] * self.lora_B[:, None, :]).flatten(1)

    def _sum(self, output_SBO: Tensor, low_SBr: Tensor) -> Tensor:
        """output + scale * B low, in one product."""
        added = torch.addmm(output_SBO.flatten(0, 1), low_SBr.flatten(0, 1), self.wide_B().t(), alpha=self.scale)
        return added.view_as(output_SBO)

    def _dropped(self, input_SBI: Tensor, *, same_on_all_ranks: bool) -> Tensor:
        if not self.training or self.dropout == 0:
            return input_SBI
        if same_on_all_ranks:
            return F.dropout(input_SBI, self.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(input_SBI, self.dropout)

    @torch.no_grad()
    def added_weight(self, rows_of_B: Tensor) -> Tensor:
        """fp32 [rows, I]: scale * B A for the rows of the layer's weight that `rows_of_B` [..., p r] belong to."""
        return self.scale * (rows_of_B.reshape(-1, self.lora_A.shape[0]).float() @ self.lora_A.float())

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A and B with their places in the whole, as megatron's dist_checkpointing asks for them."""
        assert metadata is not None, "megatron hands its groups on"
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {} if self.divided is None else {self.divided: self._divided_dimension},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.is_gated:
            name = f"{prefix}lora_B"
            singly = metadata.get("singleton_local_shards", False)
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets, singly)
        return state


class ColumnParallelAdapter(Adapter):
    """Beside a layer whose outputs are divided over tp; its inputs are replicated or divided along the sequence."""

    divided = "lora_B"

    def forward(self, input_SBI: Tensor, output_SBO: Tensor) -> Tensor:
        """[S, B, O]: `output_SBO` plus this rank's outputs of the adapter.

        Collectives, over tp: backward one all-reduce of [S, B, r]; with sequence parallelism an all-gather of
        [S, B, r] in the forward and a reduce-scatter in the backward instead.
        """
        dropped_SBI = self._dropped(input_SBI, same_on_all_ranks=not self.sequence_parallel)
        low_SBr = F.linear(dropped_SBI, self.lora_A)
        if self.sequence_parallel:
            low_SBr = gather_from_sequence_parallel_region(low_SBr, group=self.tp_group)
        else:
            low_SBr = copy_to_tensor_model_parallel_region(low_SBr, group=self.tp_group)
        return self._sum(output_SBO, low_SBr)


class RowParallelAdapter(Adapter):
    """Beside a layer whose inputs are divided over tp; its outputs are replicated or divided along the sequence."""

    divided = "lora_A"

    def forward(self, input_SBI: Tensor, output_SBO: Tensor) -> Tensor:
        """[S, B, O]: `output_SBO` plus the adapter's outputs.

        Collectives, over tp: forward one all-reduce of [S, B, r]; with sequence parallelism a reduce-scatter in the
        forward and an all-gather in the backward instead.
        """
        low_SBr = F.linear(self._dropped(input_SBI, same_on_all_ranks=False), self.lora_A)
        if self.sequence_parallel:
            low_SBr = reduce_scatter_to_sequence_parallel_region(low_SBr, group=self.tp_group)
        else:
            low_SBr = reduce_from_tensor_model_parallel_region(low_SBr, group=self.tp_group)
        return self._sum(output_SBO, low_SBr)


class ReplicatedAdapter(Adapter):
    """Beside a layer that every tensor-parallel rank has whole."""

    divided = None

    def forward(self, input_SBI: Tensor, output_SBO: Tensor) -> Tensor:
        """[S, B, O]: `output_SBO` plus the adapter's outputs of the same tokens."""
        dropped_SBI = self._dropped(input_SBI, same_on_all_ranks=not self.sequence_parallel)
        return self._sum(output_SBO, F.linear(dropped_SBI, self.lora_A))


_PLACES: dict[str, tuple[str, type[Adapter]]] = {
    "linear_qkv": ("self_attention", ColumnParallelAdapter),
    "linear_proj": ("self_attention", RowParallelAdapter),
    "linear_fc1": ("mlp", ColumnParallelAdapter),
    "linear_fc2": ("mlp", RowParallelAdapter),
    **{
        name: ("self_attention", ReplicatedAdapter if "down" in name else ColumnParallelAdapter)
        for name in OF_LATENT_ATTENTION
    },
}
"""The part of a layer that holds a target, and the kind of adapter it gets."""


def initial_A(rank: int, num_inputs: int, draw: torch.Generator) -> Tensor:
    """fp32 [r, num_inputs] on the CPU, uniform within 1/sqrt(num_inputs), as PEFT starts."""
    bound = 1 / math.sqrt(num_inputs)
    return torch.empty(rank, num_inputs, device="cpu").uniform_(-bound, bound, generator=draw)


def generator_of(seed: int, layer_number: int, target: str) -> torch.Generator:
    """The generator for the A of one layer, counted from 1; the same under every parallel layout."""
    digest = hashlib.sha256(f"{seed} {layer_number} {target}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def add_adapters(chunk: GPTModel, settings: LoRAConfig, *, tp_group: ProcessGroup, seed: int) -> None:
    """Freeze every parameter of `chunk` and give the chosen layers adapters; only these are trained.

    An adapter reads the input of its layer. The input of a layer that fuses its norm would be the norm's, so such
    layers are not fused.
    """
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for target, own_parts in settings.layers.items():
            owner_name, kind = _PLACES[target]
            owner = getattr(layer, owner_name)
            linear = getattr(owner, target, None)
            if linear is None:
                continue
            adapter = kind(
                linear.weight,
                settings,
                tp_group=tp_group,
                sequence_parallel=chunk.config.sequence_parallel,
                is_gated=target == "linear_fc1" and chunk.config.gated_linear_unit,
                draw=generator_of(seed, layer.layer_number, target),
                **_parts(own_parts, target, linear.weight.shape[0], chunk.config, tp_group),
            )
            owner.add_module(target + ADAPTER_SUFFIX, adapter)
            linear.register_forward_hook(adapter.add_to, prepend=True)  # before a norm of the output


def _parts(
    own_parts: tuple[int, ...] | None, target: str, num_rows: int, config: TransformerConfig, tp_group: ProcessGroup
) -> dict[str, Tensor]:
    """The argument `parts_Op` of an adapter, for the `num_rows` of its layer's weight that this rank has."""
    if own_parts is None:
        return {}
    if target == "linear_fc1":
        part_of_row = (torch.arange(num_rows) >= num_rows // 2).long()
    else:
        # Groups of query, key and value heads, cut evenly over the ranks and so maybe in their midst.
        num_queries = config.num_attention_heads // config.num_query_groups
        heads = (torch.arange(num_rows) + tp_group.rank() * num_rows) // config.kv_channels % (num_queries + 2)
        part_of_row = (heads - num_queries + 1).clamp(min=0)
    return {"parts_Op": part_of_row[:, None] == torch.tensor(own_parts)}


def redraw_adapters(chunk: GPTModel, settings: LoRAConfig, *, seed: int) -> None:
    """Set the adapters of `chunk` to the weights that `add_adapters` gives them under `seed`."""
    for layer in chunk.decoder.layers:
        for target in settings.layers:
            adapter = getattr(getattr(layer, _PLACES[target][0]), target + ADAPTER_SUFFIX, None)
            if adapter is not None:
                adapter.draw_weights(generator_of(seed, layer.layer_number, target))
