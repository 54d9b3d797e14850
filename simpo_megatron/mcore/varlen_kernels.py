"""Variable-length attention on a GPU without Transformer Engine: FlashAttention, one call for all segments of a layer.

Shapes: Q queries and K keys of all segments, concatenated; A attention heads, G key/value groups, D head size.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

# torch's FlashAttention 2 multiplies in half precision, in vectors of 16 bytes.
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_SIZE, _HEAD_SIZE_MULTIPLE = 256, 8
_AMPERE, _HOPPER = 8, 9


class Scores(NamedTuple):
    """A layer's scale, soft cap and window of attention scores."""

    scale: float | None = None
    """Factor of the products of queries and keys; None: one over the root of the head size."""
    window: int | None = None
    """Keys that a query sees at most, its own the last of them."""
    softcap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    dropout: float = 0.0


Kernel = Callable[..., Tensor]
"""(query_QAD, key_KGD, value_KGD, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv) to [Q, A, D].

Each segment is causal from the bottom right: its last query sees all its keys.
"""


def varlen_kernel(query: Tensor, key: Tensor, scores: Scores) -> Kernel | None:
    """The kernel for a layer with these scores, chosen by device, dtype, heads and head size.

    None where no installed kernel supports it: on the CPU, in fp32, with dropout, or before torch 2.10.
    """
    if scores.dropout or not _has_flash_attention(query):
        return None
    if scores.softcap is not None:
        return _flash_attn_kernel(scores)
    return _torch_kernel(scores, is_grouped=query.size(-2) != key.size(-2))


def _has_flash_attention(query: Tensor) -> bool:
    size = query.size(-1)
    if query.device.type == "cpu" or query.dtype not in _DTYPES:
        return False
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device)[0] < _AMPERE:
        return False
    return size <= _MAX_HEAD_SIZE and size % _HEAD_SIZE_MULTIPLE == 0


def _torchs_own() -> tuple[Callable[..., Any] | None, Mapping[str, Any]]:
    """torch's varlen_attn and its parameters by name; None before torch 2.10."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None, {}
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return varlen_attn, inspect.signature(varlen_attn).parameters


@functools.cache
def _torch_kernel(scores: Scores, *, is_grouped: bool) -> Kernel | None:
    """torch's varlen_attn, called with the options of the installed version.

    torch 2.10 has `is_causal`; 2.11 a window, whose (-1, 0) is causal; 2.12 an option for grouped heads.
    """
    varlen_attn, known = _torchs_own()
    if varlen_attn is None:
        return None
    options: dict[str, Any] = {}
    if "window_size" in known:
        # Keys to the left of a query and to its right.
        options["window_size"] = (-1 if scores.window is None else scores.window - 1, 0)
    elif scores.window is None:
        options["is_causal"] = True
    else:
        return None
    if scores.scale is not None and "scale" not in known:
        return None
    if scores.scale is not None:
        options["scale"] = scores.scale
    if is_grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


@functools.cache
def _flash_attn_kernel(scores: Scores) -> Kernel | None:
    """The function of the package flash-attn, which has a soft cap since 2.6; torch's own has none."""
    try:
        attend = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, OSError):  # not installed, or built for another torch
        return None
    if "softcap" not in inspect.signature(attend).parameters:
        return None
    return functools.partial(
        attend,
        softmax_scale=scores.scale,
        causal=True,
        window_size=(-1 if scores.window is None else scores.window - 1, 0),
        softcap=scores.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@functools.cache
def prepare_torch() -> None:
    """Set torch's global attention options on a GPU, once per process.

    Turns cuDNN off in scaled_dot_product_attention: it builds a plan for each new pair of lengths, and here all are
    new. Replaces FlashAttention 2 by FlashAttention 3 where possible.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if _has_flash_attention_3():
        importlib.import_module("torch.nn.attention").activate_flash_attention_impl("FA3")


def attention_name() -> str:
    """The attention of a GPU without Transformer Engine, in half precision and without a soft cap."""
    if _torchs_own()[0] is None:
        return "torch, a call a segment (from torch 2.10 on one a layer)"
    return f"FlashAttention {3 if _has_flash_attention_3() else 2}"


def _has_flash_attention_3() -> bool:
    """True on Hopper with its package, and a torch that swaps it in and, from 2.11 on, hands it the longest lengths.

    Source: pytorch #173681.
    """
    if find_spec("flash_attn_interface") is None or "window_size" not in _torchs_own()[1]:
        return False
    return torch.cuda.get_device_capability()[0] == _HOPPER
