"""Figures that a plan assumes of the machines: data sheets, and the share of them that real kernels reach."""

from __future__ import annotations

from dataclasses import dataclass

from simpo_megatron.config import Machine

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in nodes of `per_node`, by its maker's data sheet; rates are per second and GPU."""

    memory_gib: float
    """GiB that the driver shows."""
    bf16_flops: float
    """Dense, without sparsity."""
    fp8_flops: float | None
    memory_bytes_rate: float
    nvlink_bytes_rate: float
    """Each way, to the other GPUs of the node."""
    network_bytes_rate: float
    """Each way, to other nodes: 400 Gbit/s InfiniBand for each GPU (200 beside A100)."""
    compute_capability: tuple[int, int]
    per_node: int = 8

    @property
    def machine(self) -> Machine:
        return Machine(has_cuda=True, has_transformer_engine=True, compute_capability=self.compute_capability)


GPUS = {
    "h100-80gb": Gpu(
        memory_gib=79.6,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        memory_bytes_rate=3.35e12,
        nvlink_bytes_rate=450e9,
        network_bytes_rate=50e9,
        compute_capability=(9, 0),
    ),
    "h200-141gb": Gpu(
        memory_gib=140.4,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        memory_bytes_rate=4.8e12,
        nvlink_bytes_rate=450e9,
        network_bytes_rate=50e9,
        compute_capability=(9, 0),
    ),
    "a100-80gb": Gpu(
        memory_gib=79.2,
        bf16_flops=312e12,
        fp8_flops=None,
        memory_bytes_rate=2.0e12,
        nvlink_bytes_rate=300e9,
        network_bytes_rate=25e9,
        compute_capability=(8, 0),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of the data-sheet figures that are reached. Assumed from experience, measured by nobody here."""

    usable_memory: float = 0.94
    """Of a GPU's memory; the rest is the allocator's fragmentation."""
    bf16: float = 0.65
    """Of the bf16 rate, in matrix products."""
    fp8: float = 0.45
    """Of the FP8 rate, casts included."""
    attention: float = 0.45
    """Of the bf16 rate, in variable-length attention."""
    links: float = 0.7
    """Of NVLink's and the network's rates, in collectives."""
    elementwise: float = 0.7
    """Of the memory's rate, in norms, SwiGLU, rotation and the optimizer."""
    speed_error: float = 0.03
    """Share of a step's time below which two layouts count as equally fast."""


ASSUMED = Assumptions()
