"""All changes to modules of megatron-core and torch; `patch_table` lists each, and no other module makes any.

Most let unmodified megatron-core run without CUDA. On a GPU, `install` only replaces functions of a missing Transformer
Engine or apex, compiles what megatron-core leaves uncompiled without it, and corrects the restored state of torch's
Adam. Each patch is as narrow as the place it serves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import multiprocessing.dummy
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from simpo_megatron.errors import ConfigError
from simpo_megatron.loss.products import add_product
from simpo_megatron.mcore import device
from simpo_megatron.mcore.attention.rotation import rotated
from simpo_megatron.mcore.patch_table import MODULES_NAMING_CUDA

CONFIGURATIONS = "transformers.models.llama.configuration_llama"
"""A module whose imports are those of every model's configuration."""
_LAYERS = "megatron.core.models.gpt"
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full")


@functools.cache
def install() -> None:
    """Make megatron-core run on this machine. Call it before building anything with megatron."""
    # torch's own switch, read at its first tensor: large CPU tensors use huge pages, whose page faults cost a fifth.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    hide_unloadable_transformer_engine()
    if device.has_cuda():
        _compile_for_any_length()
    else:
        _run_without_cuda()
    if not device.has_apex():
        _add_weight_gradients_by_torch()
    if not device.has_transformer_engine():
        _define_te_general_gemm()
        _recompute_parts_without_transformer_engine()
        if device.has_cuda():
            _compile_rotary_embedding()
    if device.adam() is torch.optim.AdamW:
        _restore_adam_step_of_the_distributed_optimizer()


def hide_unloadable_transformer_engine() -> None:
    """Let megatron-core run on a CPU beside a Transformer Engine that is installed and cannot be loaded.

    megatron-core only expects one to be absent, and its import fails with any other error. Call it before that import.

    Raises:
        ConfigError: there is a GPU, for which Transformer Engine was installed.
    """
    name = "transformer_engine"
    failure = device.transformer_engine_failure() if importlib.util.find_spec(name) is not None else None
    if failure is None:
        return
    if device.has_cuda():
        raise ConfigError(
            f"{name}: found an installed one that cannot be loaded ({failure}), expected one with its core for this "
            "CUDA; install it with pip install 'simpo-megatron[te]', or leave it out with pip uninstall "
            "transformer-engine"
        )
    for part in [part for part in sys.modules if part.split(".")[0] == name]:
        del sys.modules[part]
    # As import itself marks a module that is not there.
    sys.modules[name] = None  # type: ignore[assignment]


def _run_without_cuda() -> None:
    _replace_cuda_runtime()
    import_uncompiled()
    _allocate_on_the_cpu()
    _replace_random_state()
    _name_cpu_tensors_as_the_optimizers_expect()
    _route_tokens_on_the_cpu()
    _scale_tensors_where_they_are()
    _rotate_in_one_pass()


def _replace(owner: Any, **replacements: Any) -> None:
    """Set attributes of a foreign module or class."""
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


class _NullStream:
    """A CUDA stream or event on a machine without CUDA, which runs everything in order: each method is a no-op."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NullStream]:
        return lambda *args, **kwargs: self


def _compile_for_any_length() -> None:
    """Let megatron's fused functions compile once for all lengths, instead of for the first one and again for others.

    Sets what torch.compile(dynamic=True) sets for its own function.
    """
    importlib.import_module("torch._dynamo").config.assume_static_by_default = False


def _compile_rotary_embedding() -> None:
    utils = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    _replace(utils, _apply_rotary_pos_emb_bshd=torch.compile(utils._apply_rotary_pos_emb_bshd))


def _replace_cuda_runtime() -> None:
    _replace(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *args, **kwargs: None,
        current_stream=_NullStream,
        default_stream=_NullStream,
        Stream=_NullStream,
        Event=_NullStream,
        stream=lambda *args, **kwargs: contextlib.nullcontext(),
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
    )
    _replace(torch.Tensor, cuda=lambda self, *args, **kwargs: self)


def import_uncompiled(*modules: str) -> None:
    """Import `modules`, megatron's layers and transformers' configurations when none is named.

    Without CUDA decorators that compile are inert meanwhile. It serves only where nothing has imported them yet.
    """
    if device.has_cuda():
        return
    compile_, disable = torch.compile, torch.compiler.disable

    def as_it_is(function: Any = None, *args: Any, **kwargs: Any) -> Any:
        return function or (lambda function: function)

    _replace(torch, compile=lambda model=None, **kwargs: as_it_is(model))
    _replace(torch.compiler, disable=as_it_is)
    try:
        for name in modules or (_LAYERS, CONFIGURATIONS):
            importlib.import_module(name)
    finally:
        _replace(torch, compile=compile_)
        _replace(torch.compiler, disable=disable)


class TorchOnCpu(types.ModuleType):
    """`torch` as one megatron module sees it: a tensor asked for on CUDA is made on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def allocate(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device="cpu" if str(device).startswith("cuda") else device, **kwargs)

    return allocate


def _allocate_on_the_cpu() -> None:
    for name in MODULES_NAMING_CUDA:
        _replace(importlib.import_module(name), torch=TorchOnCpu())


def _replace_random_state() -> None:
    _replace(
        importlib.import_module("megatron.core.tensor_parallel.random"),
        _get_cuda_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
    )


def _name_cpu_tensors_as_the_optimizers_expect() -> None:
    type_ = torch.Tensor.type

    @functools.wraps(type_)
    def type_seen_by_caller(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    _replace(torch.Tensor, type=type_seen_by_caller)


def _define_te_general_gemm() -> None:
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        _replace(utils, te_general_gemm=None)


def _route_tokens_on_the_cpu() -> None:
    def as_on_the_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    _replace(dispatcher, maybe_move_tensor_to_cpu=as_on_the_cpu)


def _scale_tensors_where_they_are() -> None:
    def scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], factor: Any) -> None:
        for source, target in zip(*tensor_lists, strict=True):
            torch.mul(source, factor, out=target)

    for name in ("clip_grads", "optimizer"):
        _replace(importlib.import_module(f"megatron.core.optimizer.{name}"), multi_tensor_scale_impl=scale)


def _rotate_in_one_pass() -> None:
    utils = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    as_megatron = utils._apply_rotary_pos_emb_bshd

    @functools.wraps(as_megatron)
    def rotate(
        t: torch.Tensor, freqs: torch.Tensor, rotary_interleaved: bool = False, mscale: float = 1.0, **latent: Any
    ) -> torch.Tensor:
        if any(latent.values()):
            return as_megatron(t, freqs, rotary_interleaved=rotary_interleaved, mscale=mscale, **latent)
        return rotated(t, freqs, interleaved=rotary_interleaved, factor=mscale)

    _replace(utils, _apply_rotary_pos_emb_bshd=rotate)


def _recompute_parts_without_transformer_engine() -> None:
    _replace(
        importlib.import_module("megatron.core.tensor_parallel.random"),
        FP8GlobalStateManager=types.SimpleNamespace(is_fp8_enabled=lambda: False),
        activation_recompute_forward=lambda **_: contextlib.nullcontext(),
        fp8_autocast=lambda **_: contextlib.nullcontext(),
    )


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

    _replace(optimizer, _set_main_param_and_optimizer_states=set_states_and_step)


def _add_weight_gradients_by_torch() -> None:
    """Let megatron's linear layers add weight gradients by torch's product instead of apex's kernel."""

    def add(rows: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
        add_product(main_grad, gradient.t(), rows)

    _replace(
        importlib.import_module("megatron.core.tensor_parallel.layers"),
        fused_weight_gradient_mlp_cuda=types.SimpleNamespace(wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add),
        _grad_accum_fusion_available=True,
    )


def write_checkpoints_in_threads() -> None:
    """Let megatron's checkpoint writer work in threads of this process, as megatron-core 0.17 does by itself.

    A fork would copy every connection and lock of the rank, and would outlive a killed rank. `_results_queue` is the
    pool that an earlier save may have left.
    """
    _replace(
        importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async"),
        mp=types.SimpleNamespace(get_context=lambda method=None: multiprocessing.dummy),
        _results_queue=None,
    )


def drop_warning_of_incomplete_folder() -> None:
    """Drop the warning that megatron logs about a checkpoint folder that is not empty."""
    importlib.import_module("megatron.core.dist_checkpointing.serialization").logger.addFilter(_is_news)


@contextlib.contextmanager
def reading_by(index: Metadata, load: Callable[..., Any]) -> Iterator[None]:
    """While the context lasts, torch and megatron read a checkpoint by `index`, and every file and part by `load`."""
    cached = importlib.import_module("megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader")
    readers = (FileSystemReader, cached.CachedMetadataFileSystemReader)
    before = torch.load, [reader.read_metadata for reader in readers]
    try:
        _replace(torch, load=load)
        for reader in readers:
            _replace(reader, read_metadata=lambda self, *args, **kwargs: index)
        yield
    finally:
        _replace(torch, load=before[0])
        for reader, read_metadata in zip(readers, before[1], strict=True):
            _replace(reader, read_metadata=read_metadata)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Overwriting old incomplete")


def keep_compiled_helpers() -> None:
    """Let Megatron-LM's training start from megatron-core's wheel, whose data helpers are already compiled."""
    utils = importlib.import_module("megatron.core.datasets.utils")
    if not Path(str(utils.__file__)).with_name("Makefile").exists():
        _replace(utils, compile_helpers=lambda: None)
