"""The quantities that a rank's memory and a step's time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo_megatron.config import Config
from simpo_megatron.parallel import ParallelSizes
from simpo_megatron.planning.shapes import ModelShape, Pack

Engine = Literal["transformer_engine", "torch"]
"""Whose layers compute: Transformer Engine's on GPUs, megatron's local torch modules on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The quantities that a rank's memory depends on, its pipeline stage apart."""

    shape: ModelShape
    config: Config
    pack: Pack
    data_parallel_size: int
    num_microbatches: int
    """Of one data-parallel rank and step."""
    engine: Engine = "transformer_engine"

    @property
    def sizes(self) -> ParallelSizes:
        return self.config.parallel.sizes

    @property
    def itemsize(self) -> int:
        return 2 if self.config.precision.bf16 else 4

    @property
    def sequence_ranks(self) -> int:
        return self.sizes.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def tokens(self) -> float:
        """S: a rank's tokens of a pack."""
        return self.pack.tokens / self.sizes.context

    @property
    def dense_copies(self) -> int:
        """Ranks that hold the same weights, experts apart."""
        return self.data_parallel_size * self.sizes.context

    @property
    def expert_copies(self) -> float:
        """Ranks that hold the same experts: these are whole, and spread over all ranks of a stage."""
        return self.dense_copies * self.sizes.tensor / self.sizes.expert

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Parts of a layer that are computed again one by one: core_attn, mlp; an MoE's mlp is megatron's moe."""
        recompute, mlp = self.config.recompute, "moe" if self.shape.num_moe_experts else "mlp"
        if recompute.recompute_granularity != "selective":
            return ()
        named = {"core_attn": "core_attn", mlp: "mlp"}
        return tuple(named[module] for module in recompute.recompute_modules if module in named)

    @property
    def hidden_bytes(self) -> float:
        """The bytes of [S, H], sharded over the tensor ranks under sequence parallelism: what stages hand on."""
        return self.tokens * self.shape.hidden_size * self.itemsize / self.sequence_ranks
