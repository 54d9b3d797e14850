"""A stand-in for Transformer Engine's FP8 tensor, which does not exist without a GPU. Nothing of theirs runs here.

It keeps what megatron-core and the package rely on: one byte a value beside one scale, a transposed copy that is made
anew only when asked for, `copy_` that quantises by the
largest value (per-tensor current scaling), `dequantize`, and the values it was made from, on request, once. Every other
operation reads it in bf16; those that would change it in place are an error. `install` puts it where megatron-core
looks for Transformer Engine's class and its two functions.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from types import MethodType, SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from torch import Tensor
from torch.utils._pytree import tree_map_only

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantised(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes, what one unit of them is worth) of bf16 `values` whose tensor's largest magnitude is `largest`."""
    scale = LARGEST / largest.float()
    return (values.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8), scale.reciprocal().reshape(1)


class StandIn(Tensor):
    """[...] e4m3 values that pass for bf16."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, scale_inv: Tensor) -> StandIn:
        tensor = Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)
        tensor._data, tensor._scale_inv, tensor._transpose = data, scale_inv, data.t().clone()
        return tensor

    def dequantize(self) -> Tensor:
        return (self._data.view(torch.float8_e4m3fn).float() * self._scale_inv).bfloat16()

    from_float8 = dequantize

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._data, args[0]._scale_inv)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            target, source = args[0], args[1].dequantize() if isinstance(args[1], cls) else args[1].bfloat16()
            data, scale_inv = quantised(source, source.abs().max())
            target._data.copy_(data)
            target._scale_inv.copy_(scale_inv)
            _transpose_again([target])
            return target
        name = func.overloadpacket.__name__
        assert not (name.endswith("_") and isinstance(args[0], cls)), f"{name} would change an FP8 tensor in place"
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)


def keep_in_fp8(module: torch.nn.Module, name: str = "weight") -> None:
    """Make a parameter of `module` an FP8 one, as Transformer Engine does under preserve_high_precision_init_val."""
    before = getattr(module, name)
    values = before.detach().clone().normal_()
    data, scale_inv = quantised(values, values.abs().max())
    weight = torch.nn.Parameter(StandIn(data, scale_inv))
    weight.__dict__.update(before.__dict__)
    weight._high_precision_init_val = values
    weight.get_high_precision_init_val = MethodType(lambda self: self._high_precision_init_val, weight)
    weight.clear_high_precision_init_val = MethodType(
        lambda self: self.__dict__.pop("_high_precision_init_val", None), weight
    )
    setattr(module, name, weight)


def keep_layer_in_fp8(layer: torch.nn.Module) -> None:
    """Make the matrices of a dense transformer `layer` FP8 ones."""
    attention, mlp = layer.self_attention, layer.mlp
    for module in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
        keep_in_fp8(module)


def _replace_storage(weight: StandIn, data: Tensor) -> None:
    data.copy_(weight._data)
    weight._data = data


def _quantise_shards(weights: list, masters: list, starts: list, group: dist.ProcessGroup, *unused) -> None:
    """Each weight's part from its rank's masters, by the largest value on all ranks; the rest is to be gathered."""
    for weight, master, start in zip(weights, masters, starts, strict=True):
        weight.clear_high_precision_init_val()
        values = torch.zeros(1) if master is None else master.bfloat16()
        largest = values.abs().max().float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        data, scale_inv = quantised(values, largest)
        weight._scale_inv.copy_(scale_inv)
        if master is not None:
            weight._data.view(-1)[start : start + master.numel()].copy_(data)


def _transpose_again(weights: list) -> None:
    for weight in weights:
        weight._transpose = weight._data.t().clone()


@contextlib.contextmanager
def _one_by_one(group: dist.ProcessGroup, device: object = None, async_ops: bool = False):
    """gloo gathers buckets of bytes and of bf16 as if they were of one type; NCCL does not. So each goes by itself."""
    yield SimpleNamespace(wait=lambda: None)


def _at_once(collective: Callable) -> Callable:
    return lambda *args, async_op=False, **kwargs: collective(*args, **kwargs)


def install() -> None:
    """Let megatron-core take the stand-in for Transformer Engine's tensors, and bear with gloo."""
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    buffers._coalescing_manager = _one_by_one
    buffers.dist_all_gather_func = _at_once(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = _at_once(buffers.dist_reduce_scatter_func)
    fp8_utils.te_post_all_gather_processing = _transpose_again
    fp8_utils.is_te_min_version = lambda version: True
    fp8_utils.HAVE_TE_FP8_TENSOR_CLASS, fp8_utils.FP8_TENSOR_CLASS = True, StandIn
    fp8_utils._modify_underlying_storage_impl = _replace_storage
    fp8_utils._quantize_param_shard_impl = _quantise_shards
