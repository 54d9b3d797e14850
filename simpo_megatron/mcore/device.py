"""Questions about the device of this rank: whether there is CUDA, how much memory, which kernels are installed.

The only module that asks whether CUDA is there; `cpu_patches` lets megatron-core run without it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os

import torch

from simpo_megatron.config import Machine
from simpo_megatron.errors import ConfigError, StoppedBySignal
from simpo_megatron.loss.products import has_wide_products
from simpo_megatron.loss.triton_needs import missing_for_triton
from simpo_megatron.mcore.varlen_kernels import attention_name

_MAX_SHOWN = 160


def has_cuda() -> bool:
    """True when this process trains on a GPU."""
    return torch.cuda.is_available()


def backend() -> str:
    """The torch.distributed backend of this machine: `nccl` with CUDA, `gloo` without."""
    return "nccl" if has_cuda() else "gloo"


def current_device() -> torch.device:
    """The device this rank's tensors live on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def memory_bytes() -> int:
    """The memory of this rank's GPU, or of the machine where there is none."""
    if has_cuda():
        return torch.cuda.get_device_properties(current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_architecture() -> tuple[int, int] | None:
    """The compute capability of the first GPU, read from its driver without starting CUDA; None without a GPU."""
    if torch.version.cuda is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    return None if failed else (major.value, minor.value)


def is_out_of_memory(error: Exception) -> bool:
    """True when `error` is an out-of-memory error of the GPU or of the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"))


def machine() -> Machine:
    """The facts of this machine that the configuration depends on."""
    return Machine(
        has_cuda=has_cuda(),
        has_transformer_engine=has_transformer_engine(),
        cuda=_cuda_version(),
        compute_capability=torch.cuda.get_device_capability(own_gpu()) if has_cuda() else None,
    )


def _cuda_version() -> tuple[int, int] | None:
    if torch.version.cuda is None:
        return None
    major, minor, *_ = torch.version.cuda.split(".")
    return int(major), int(minor)


def own_gpu() -> int:
    """The number of this rank's GPU, also before it is the current one; torch's default would be GPU 0.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks.
    """
    number, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= num_gpus:
        raise ConfigError(
            f"LOCAL_RANK: found {number}, expected less than {num_gpus}, the GPUs of this machine; start one rank a GPU"
        )
    return number


def has_transformer_engine() -> bool:
    """True when Transformer Engine is installed and can be loaded."""
    return importlib.util.find_spec("transformer_engine") is not None and transformer_engine_failure() is None


def uses_transformer_engine(*, bf16: bool) -> bool:
    """True where layers are Transformer Engine's: on a GPU, in bf16.

    In fp32, up to 2.9 at least, it has no attention for a pack, and its products round their inputs to TF32.
    """
    return has_cuda() and bf16 and has_transformer_engine()


def transformer_engine_failure() -> str | None:
    """The reason why Transformer Engine cannot be loaded, in one line; None where it is loaded."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except StoppedBySignal:
        raise
    except Exception as error:
        # PyPI's bare meta package raises RuntimeError, a build for another CUDA OSError, one without torch ImportError.
        return " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_SHOWN]
    return None


def kernels(*, bf16: bool) -> str:
    """A line on the implementations of layers, Adam and, on a GPU, the loss, and on weight gradients."""
    layers = "Transformer Engine" if uses_transformer_engine(bf16=bf16) else "torch"
    if has_cuda() and layers == "torch":
        layers += f", attention: {attention_name() if bf16 else 'torch, a call a segment'}"
    optimizer = {"transformer_engine": "Transformer Engine", "apex": "apex"}.get(
        adam().__module__.split(".")[0], "torch"
    )
    fusion = "on" if fuses_weight_gradients() else "off"
    loss = ""
    if has_cuda():
        missing = missing_for_triton()
        loss = ", loss: Triton" if missing is None else f", loss: torch, for Triton lacks {missing}"
    return f"layers: {layers}, Adam: {optimizer}, grad accumulation fusion: {fusion}{loss}"


def has_apex() -> bool:
    """True when NVIDIA's apex brings the kernel that adds weight gradients to `main_grad`."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fuses_weight_gradients() -> bool:
    """True when GEMMs add weight gradients to `main_grad` themselves, in fp32: on a GPU, by apex or a recent torch."""
    return has_cuda() and (has_apex() or has_wide_products())


def adam() -> type:
    """The Adam that megatron's optimizers use: Transformer Engine's, apex's or, without either, torch's AdamW."""
    kind: type = importlib.import_module("megatron.core.optimizer").Adam
    return kind


def require_local_ranks(num_ranks: int) -> None:
    """Refuse to start more ranks than this machine has GPUs; a machine without GPUs may run any number.

    Raises:
        ConfigError: when there are GPUs, but fewer than `num_ranks`.
    """
    if has_cuda() and torch.cuda.device_count() < num_ranks:
        raise ConfigError(
            f"layout: found {num_ranks} ranks, expected at most {torch.cuda.device_count()}, the GPUs of this machine; "
            "choose a smaller --tp, --pp or --cp, or start the job on more machines with torchrun --nnodes"
        )
