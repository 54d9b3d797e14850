"""Weights of Hugging Face folders in and out of megatron-core's model, without a separate conversion."""

from simpo_megatron.convert.adapter import export_adapter, trained_share
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
    "trained_share",
]
