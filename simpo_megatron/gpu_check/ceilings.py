"""The machine: versions, free memory, and the two rates that bound every speed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from simpo_megatron.gpu_check.timing import median_seconds
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict
from simpo_megatron.loss.triton_needs import missing_for_triton
from simpo_megatron.planning.gpus import peak_bf16_flops

_PACKAGES = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "liger-kernel")
_FOREIGN_GIB = 2.0
"""The most memory in use that torch has not reserved; CUDA's context of this process is some 0.6 GiB of it."""


def measure_ceilings(setting: CheckSetting) -> Verdict:
    """Measures copy bandwidth and the rate of a large bf16 product; fails when other processes use the GPU."""
    size, num_bytes = setting.size(8192, 64), setting.size(2**31, 2**16)
    left, right = (torch.randn(size, size, device=setting.device).bfloat16() for _ in range(2))
    source = torch.empty(num_bytes, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    product = median_seconds(lambda: left @ right, setting)
    copy = median_seconds(lambda: target.copy_(source), setting)
    flops, bandwidth = 2 * size**3 / product, 2 * num_bytes / copy
    missing = missing_for_triton()
    details = {
        "versions": {name: _version(name) for name in _PACKAGES},
        "gemm_tflops": flops / 1e12,
        "copy_tb_per_second": bandwidth / 1e12,
    }
    value = f"{flops / 1e12:.4g} TFLOP/s, {bandwidth / 1e12:.3g} TB/s"
    if setting.rehearse:
        return Verdict.of(True, value, "not judged", **details)
    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    foreign = (total - free - torch.cuda.memory_reserved()) / 2**30
    peak = peak_bf16_flops(name)
    details |= {"device": name, "cuda": torch.version.cuda, "memory_gib": total / 2**30, "foreign_gib": foreign}
    holds = foreign < _FOREIGN_GIB and (peak is None or flops > 0.5 * peak) and missing is None
    value += f", Triton lacks {missing}" if missing else ""
    return Verdict.of(
        holds,
        f"{name}: {value}, {foreign:.1f} GiB in use beside torch's",
        f"half of the peak, {_FOREIGN_GIB:g} GiB for CUDA itself, what Triton compiles with",
        **details,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
