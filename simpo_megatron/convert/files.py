"""Safetensors files as they are written: a stream, one tensor in memory at a time, of finite values alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpo_megatron.convert.direct_io import DirectFile
from simpo_megatron.errors import NumericsError

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Names of the dtypes that weights are read from and written in."""


@dataclass(frozen=True)
class TensorSpec:
    """The header entry of a tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_bytes(specs: Mapping[str, TensorSpec]) -> bytes:
    """The start of a safetensors file of these tensors, in this order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def require_finite(values: Tensor, where: str) -> None:
    """Return if all `values` are numbers; they are read once.

    Raises:
        NumericsError: naming `where` they are, when one is NaN or infinite.
    """
    if values.numel() and not all(map(math.isfinite, map(float, torch.aminmax(values)))):
        count = int((~torch.isfinite(values)).sum())
        raise NumericsError(f"{where}: found {count} of {values.numel()} values that are not finite, expected numbers")


def write_safetensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor]) -> None:
    """Write `tensors`, which come in the order of `specs`, holding one of them in memory at a time.

    The safetensors library writes whole files from memory only; a shard of 5 GB would be held twice.

    Raises:
        NumericsError: a tensor holds a value that is not finite, or becomes so when cast to its dtype.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    with DirectFile(path) as file:
        file.write(header_bytes(specs))
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            assert tensor.shape == spec.shape and tensor.dtype == spec.dtype, f"{name}: {tensor.shape} {tensor.dtype}"
            require_finite(tensor, f"{path.name}: {name}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
