"""The workload of a rank: the quantities that determine its memory and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo_megatron.config import Config
from simpo_megatron.loss.block_plan import BlockPlan
from simpo_megatron.loss.fused_linear import DEFAULT_GPU_LOGITS_BUDGET_BYTES
from simpo_megatron.mcore.families import padded_vocab_size
from simpo_megatron.parallel_sizes import ParallelSizes
from simpo_megatron.planning.shapes import ModelShape, Pack

Engine = Literal["transformer_engine", "torch"]
"""Whose layers compute: Transformer Engine's on GPUs, megatron's local torch modules on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The quantities that determine a rank's memory, besides its pipeline stage."""

    shape: ModelShape
    config: Config
    pack: Pack
    data_parallel_size: int
    num_microbatches: int
    """The microbatches of one data-parallel rank and step."""
    engine: Engine = "transformer_engine"

    @property
    def sizes(self) -> ParallelSizes:
        return self.config.parallel.sizes

    @property
    def itemsize(self) -> int:
        return 2 if self.config.precision.bf16 else 4

    @property
    def is_on_gpu(self) -> bool:
        return self.engine == "transformer_engine"

    @property
    def sequence_ranks(self) -> int:
        return self.sizes.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def tokens(self) -> float:
        """S: a rank's tokens of a pack."""
        return self.pack.tokens / self.sizes.context

    @property
    def head_rows(self) -> float:
        """N: response rows of a pack that meet the vocabulary on a rank."""
        return self.pack.response_rows / self.sizes.context

    @property
    def vocab_slice(self) -> int:
        """v: rows of the vocabulary that a rank has."""
        return padded_vocab_size(self.shape.vocab_size, self.sizes.tensor) // self.sizes.tensor

    @property
    def logit_bytes(self) -> int:
        """The bytes of a logit that log-probs are read from."""
        return 4 if self.config.precision.logit_dtype == "float32" else self.itemsize

    @property
    def head_blocks(self) -> BlockPlan:
        """The blocks into which the loss on a GPU splits the rank's vocabulary."""
        return BlockPlan.of(
            round(self.head_rows),
            self.vocab_slice,
            logit_bytes=self.logit_bytes,
            slope_bytes=self.itemsize,
            budget_bytes=DEFAULT_GPU_LOGITS_BUDGET_BYTES,
        )

    @property
    def dense_copies(self) -> int:
        """Ranks that hold the same weights, experts apart."""
        return self.data_parallel_size * self.sizes.context

    @property
    def expert_copies(self) -> float:
        """Ranks that hold the same experts; experts are whole and spread over all ranks of a stage."""
        return self.dense_copies * self.sizes.tensor / self.sizes.expert

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Parts of a layer that are recomputed one by one: core_attn, mlp (called moe in megatron for an MoE)."""
        recompute, mlp = self.config.recompute, "moe" if self.shape.num_moe_experts else "mlp"
        if recompute.recompute_granularity != "selective":
            return ()
        named = {"core_attn": "core_attn", mlp: "mlp"}
        return tuple(named[module] for module in recompute.recompute_modules if module in named)

    @property
    def hidden_bytes(self) -> float:
        """The bytes of [S, H], the message between stages; sharded over tp under sequence parallelism."""
        return self.tokens * self.shape.hidden_size * self.itemsize / self.sequence_ranks
