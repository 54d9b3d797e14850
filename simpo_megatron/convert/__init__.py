"""Weights of Hugging Face folders in and out of megatron-core's model, without a separate conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpo_megatron.lazy import lazy_names

if TYPE_CHECKING:
    from simpo_megatron.convert.adapter import export_adapter, require_targets, trained_share
    from simpo_megatron.convert.export import export_hf
    from simpo_megatron.convert.folder import check_model_files, origin_of, refuse_existing_export
    from simpo_megatron.convert.load_weights import load_hf_weights

__all__ = [
    "check_model_files",
    "export_adapter",
    "export_hf",
    "load_hf_weights",
    "origin_of",
    "refuse_existing_export",
    "require_targets",
    "trained_share",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "adapter": "export_adapter require_targets trained_share",
        "export": "export_hf",
        "folder": "check_model_files origin_of refuse_existing_export",
        "load_weights": "load_hf_weights",
    },
)
