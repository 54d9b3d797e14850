"""The environment variables of a run on GPUs, which CUDA, cuBLAS, NCCL and Transformer Engine read when they start."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from simpo_megatron.config import Config
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import device

# torch 2.9 and newer read either name, older versions only the second.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# Multiprocessors that Transformer Engine's norms leave free for communication, as in NVIDIA's recipes for Hopper.
_MARGIN = "16"
# Of each variable, the value that makes it deterministic and all that do.
# Source: megatron.training.determinism of megatron-core 0.19, NVIDIA's documentation of cuBLAS.
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


_set_here: dict[str, str] = {}


def prepare_environment(config: Config) -> dict[str, str]:
    """Sets the variables that are not set, before CUDA starts, and returns all it set; without a GPU, none.

    Raises:
        ConfigError: --deterministic, and a variable that is set to something else than it needs.
    """
    architecture = device.gpu_architecture()
    if architecture is None:
        return {}
    wanted = _wanted(config, architecture)
    if config.run.deterministic:
        _refuse_what_is_not_deterministic()
        wanted |= {name: values[0] for name, values in _DETERMINISTIC.items()}
    if any(name in os.environ for name in _ALLOCATOR):
        wanted = {name: value for name, value in wanted.items() if name not in _ALLOCATOR}
    own = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(own)
    _set_here.update(own)
    return dict(_set_here)


def _wanted(config: Config, architecture: tuple[int, int]) -> dict[str, str]:
    parallel = config.parallel
    has_unified_name = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    # Packs differ in length: without it, freed blocks of one length could not be reused for another.
    wanted = {_ALLOCATOR[0 if has_unified_name else 1]: "expandable_segments:True"}
    # cuDNN would build a plan for every new length.
    wanted["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    overlaps_layers = parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1
    if overlaps_layers and architecture < (10, 0):
        # megatron-core launches a collective before the GEMM that should overlap it, and relies on that order.
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    overlaps = overlaps_layers or parallel.overlap_grad_reduce or parallel.overlap_param_gather
    if overlaps and importlib.util.find_spec("transformer_engine") is not None:
        wanted |= {f"NVTE_{way}_LAYERNORM_SM_MARGIN": _MARGIN for way in ("FWD", "BWD")}
    return wanted


def _refuse_what_is_not_deterministic() -> None:
    for name, allowed in _DETERMINISTIC.items():
        found = os.environ.get(name)
        if found is not None and not {part.strip() for part in found.split(",")} <= set(allowed):
            raise ConfigError(
                f"{name}: found {found!r} in the environment, expected {' or '.join(allowed)} with --deterministic; "
                "unset it"
            )


@contextmanager
def deterministic(config: Config) -> Iterator[None]:
    """If the run asks for it, torch uses deterministic algorithms inside the context and raises where it has none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
