"""Hardware figures of a plan: data sheets, and the share of them that real kernels reach."""

from __future__ import annotations

import re
from dataclasses import dataclass

from simpo_megatron.config import Machine

GIB = 2**30
PROMPT_TOKENS, RESPONSE_TOKENS = 300, 400
"""Mean lengths of a prompt and of one response, where neither pairs nor lengths are given."""


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

_PEAK_TFLOPS = {
    "A100": 312,
    "A800": 312,
    "A30": 165,
    "A40": 150,
    "A10": 125,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H20": 148,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H800 PCIe": 756,
    "H200": 989,
    "H200 NVL": 835,
    "GH200": 989,
    "B200": 2250,
    "GB200": 2500,
}
"""Dense bf16 rates by NVIDIA's data sheets, in 10^12 operations a second, by the part of a device's name."""


def peak_bf16_flops(device_name: str) -> float | None:
    """The dense bf16 FLOP/s of a GPU by its driver's name; None for an unknown one or a MIG slice."""
    known = [name for name in _PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    if not known or "MIG" in device_name:
        return None
    return 1e12 * _PEAK_TFLOPS[max(known, key=len)]


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of the data-sheet figures that kernels reach. Assumed, not measured by this project."""

    usable_memory: float = 0.94
    """The usable share of a GPU's memory; the rest is the allocator's fragmentation."""
    bf16: float = 0.65
    """The share of the bf16 rate, in matrix products."""
    fp8: float = 0.45
    """The share of the FP8 rate, casts included."""
    attention: float = 0.45
    """The share of the bf16 rate, in variable-length attention."""
    links: float = 0.7
    """The share of NVLink's and the network's rates, in collectives."""
    elementwise: float = 0.7
    """The share of the memory's rate, in norms, SwiGLU, rotation and the optimizer."""
    tensor_overlap: float = 0.6
    """The share of tensor-parallel collectives that userbuffers hide behind the products beside them, with
    tp_comm_overlap. Pieces at either end of a product stay visible; hidden time is at most that of the products."""
    padding: float = 0.01
    """The padding of a pipeline's packs, to the longest of their step, as real pairs showed it."""
    speed_error: float = 0.03
    """Share of a step's time below which two layouts count as equally fast."""


ASSUMED = Assumptions()
