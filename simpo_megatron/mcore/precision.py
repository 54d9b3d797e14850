"""Dtypes of a run as megatron-core's TransformerConfig names them.

The output layer and the embedding are no Transformer Engine modules: they stay in bf16 under every recipe, and the
loss sums in fp32 whatever the format.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from simpo_megatron.config import Config, PrecisionConfig

# Hopper's two 8-bit formats: hybrid is e4m3 forward and e5m2 for gradients; block scaling has range enough for e4m3.
_FP8_FORMAT = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
_FP8_DETAILS: dict[str, dict[str, Any]] = {
    # Transformer Engine's default history; megatron-core's default of one step would follow every outlier.
    "delayed": {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    # The first and last layer are the most sensitive; NVIDIA's recipes keep them in bf16, which delayed scaling cannot.
    "tensorwise": {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    },
    "blockwise": {},
    "mxfp8": {},
}


def precision_options(precision: PrecisionConfig) -> dict[str, Any]:
    """Keyword arguments of TransformerConfig for `precision`."""
    dtype = parameter_dtype(precision)
    options: dict[str, Any] = {"bf16": precision.bf16, "params_dtype": dtype, "pipeline_dtype": dtype}
    recipe = precision.fp8_recipe
    if recipe is not None:
        options |= {"fp8": _FP8_FORMAT[recipe], "fp8_recipe": recipe, **_FP8_DETAILS[recipe]}
        options["fp8_param"] = precision.fp8_param_gather
    return options


def parameter_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The dtype of weights and activations outside FP8 products; master weights and moments are fp32 beside bf16."""
    return torch.bfloat16 if precision.bf16 else torch.float32


def export_dtype(config: Config) -> torch.dtype:
    """The dtype of the weights in the folder of `export_hf`."""
    name = config.model.export_dtype
    return parameter_dtype(config.precision) if name == "stored" else getattr(torch, name)


def rounding(stored: Iterable[torch.dtype], written: torch.dtype) -> str | None:
    """A sentence on weights of dtypes `stored` that lose digits when written as `written`; None if none do."""
    lost = sorted({dtype_name(dtype) for dtype in stored if torch.promote_types(dtype, written) != written})
    return f"{' and '.join(lost)} weights are rounded to {dtype_name(written)}" if lost else None


def dtype_name(dtype: torch.dtype) -> str:
    """`dtype` as options and config.json name it, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
