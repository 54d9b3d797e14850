"""The one module that knows CUDA may be absent: it lets unmodified megatron-core run on the CPU over gloo.

Where CUDA is there, `install` mends at most what megatron-core asks of a Transformer Engine that is absent, and how
torch's Adam is restored. Elsewhere it redirects, once, the few places at which megatron-core names a CUDA device
outright. Every replacement is as narrow as the place it serves, so that no torch call inside the layers pays for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing.dummy
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from simpo_megatron.config import Machine
from simpo_megatron.errors import ConfigError

# Modules that allocate with a literal device="cuda"; each gets its own view of `torch`, nobody else does.
_MODULES_NAMING_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.utils",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full")


def has_cuda() -> bool:
    """Whether this process trains on a GPU."""
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory did not suffice, of the GPU or, as far as the system refuses any, of the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"))


def machine() -> Machine:
    """What the configuration must know of this machine."""
    return Machine(
        has_cuda=has_cuda(),
        has_transformer_engine=_has_transformer_engine(),
        compute_capability=torch.cuda.get_device_capability() if has_cuda() else None,
    )


def _has_transformer_engine() -> bool:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError):
        # PyPI's bare meta package raises RuntimeError; a build for another CUDA cannot load its libraries.
        return False
    return True


def kernels() -> str:
    """What computes here, chosen by what is installed: the layers, Adam and the sums of weight gradients."""
    layers = "Transformer Engine" if has_cuda() and _has_transformer_engine() else "torch"
    adam = {"transformer_engine": "Transformer Engine", "apex": "apex"}.get(_adam().__module__.split(".")[0], "torch")
    fusion = "on" if fuses_weight_gradients() else "off"
    return f"layers of {layers}, Adam of {adam}, grad accumulation fusion: {fusion}"


def fuses_weight_gradients() -> bool:
    """Whether products can add weight gradients to `main_grad` themselves, in fp32: on a GPU, given NVIDIA's apex."""
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    return has_cuda() and layers._grad_accum_fusion_available


def _adam() -> type:
    """The Adam that megatron's optimizers use: Transformer Engine's, apex's or, without either, torch's AdamW."""
    return importlib.import_module("megatron.core.optimizer").Adam


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


class _NullStream:
    """A CUDA stream or event on a machine that runs everything in order: each method is a no-op."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NullStream]:
        return lambda *args, **kwargs: self


class _TorchOnCpu(types.ModuleType):
    """`torch` as one megatron module sees it: a tensor asked for on CUDA is made on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _allocate_on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _allocate_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def allocate(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device="cpu" if str(device).startswith("cuda") else device, **kwargs)

    return allocate


@functools.cache
def install() -> None:
    """Make megatron-core run on this machine. Call it before building anything with megatron."""
    # torch's own switch, read at its first tensor: large ones on the CPU lie in huge pages, whose first use costs the
    # system a fifth as much.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not has_cuda():
        _run_without_cuda()
    if not _has_transformer_engine():
        _recompute_parts_without_transformer_engine()
    if _adam() is torch.optim.AdamW:
        _restore_adam_step_of_the_distributed_optimizer()


def _run_without_cuda() -> None:
    _replace_cuda_runtime()
    _import_megatron_uncompiled()
    for name in _MODULES_NAMING_CUDA:
        importlib.import_module(name).torch = _TorchOnCpu()
    _replace_random_state()
    _name_cpu_tensors_as_the_optimizers_expect()
    _route_tokens_on_the_cpu()
    _scale_tensors_where_they_are()


def _recompute_parts_without_transformer_engine() -> None:
    """Let norms and activations be recomputed apart: megatron always asks Transformer Engine whether they are FP8."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: contextlib.nullcontext()


def keep_compiled_helpers() -> None:
    """Let Megatron-LM's training start from megatron-core's wheel, where its data helpers are compiled already.

    It runs `make` beside them at every start and ends the process where that fails; the wheel has no Makefile.
    """
    utils = importlib.import_module("megatron.core.datasets.utils")
    if not Path(utils.__file__).with_name("Makefile").exists():
        utils.compile_helpers = lambda: None


def _replace_cuda_runtime() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = cuda.Stream = cuda.Event = _NullStream
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _import_megatron_uncompiled() -> None:
    """Import megatron's model code with its `torch.compile` decorators inert.

    Fusions are off on the CPU, so nothing compiled is ever called; the decorators alone cost two seconds of
    import in every rank.
    """
    compile_, torch.compile = torch.compile, lambda model=None, **kwargs: model or (lambda function: function)
    try:
        importlib.import_module("megatron.core.models.gpt")
    finally:
        torch.compile = compile_


def _replace_random_state() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _name_cpu_tensors_as_the_optimizers_expect() -> None:
    """megatron's optimizers sort parameters by `type() == 'torch.cuda.FloatTensor'`: answer them, and only them, so."""
    type_ = torch.Tensor.type

    @functools.wraps(type_)
    def type_seen_by_caller(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_seen_by_caller


def _restore_adam_step_of_the_distributed_optimizer() -> None:
    """Keep torch AdamW's `step`, which megatron's loader drops, when a distributed optimizer is restored.

    The GPU optimizers (Transformer Engine, apex) keep the step in the parameter group; torch's keeps one
    tensor per parameter. Without this the loader fails on the missing key, and the dummy initialisation
    shares one tensor among all parameters, so that a resumed run is silently wrong.
    """
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    set_states = optimizer._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    @torch.no_grad()
    def set_states_and_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][group_order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        set_states(self, model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_states_and_step


def _route_tokens_on_the_cpu() -> None:
    """Let a mixture's router and dispatcher do without Transformer Engine's product and a copy from the GPU."""
    moe = "megatron.core.transformer.moe"
    utils = importlib.import_module(f"{moe}.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None  # named but not defined, up to megatron-core 0.16, without Transformer Engine

    def as_on_the_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    importlib.import_module(f"{moe}.token_dispatcher").maybe_move_tensor_to_cpu = as_on_the_cpu


def _scale_tensors_where_they_are() -> None:
    """Let clipping write each gradient scaled, without a temporary copy of it that is made and then copied back."""

    def scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], factor: Any) -> None:
        for source, target in zip(*tensor_lists, strict=True):
            torch.mul(source, factor, out=target)

    for name in ("clip_grads", "optimizer"):
        importlib.import_module(f"megatron.core.optimizer.{name}").multi_tensor_scale_impl = scale


def write_checkpoints_in_threads() -> None:
    """Let megatron's checkpoint writer work in threads of this process, as it does by itself from 0.17 on.

    Up to 0.16 it forks: a copy of every connection and lock of the rank goes along, and lives on where the rank is
    killed. And it spawns a process that imports torch and megatron again, seconds for each rank, only to carry the
    report, of which none of an earlier save is left here.
    """
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    writer.mp = types.SimpleNamespace(get_context=lambda method=None: multiprocessing.dummy)
    writer._results_queue = None
