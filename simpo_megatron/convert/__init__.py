"""Hugging Face folders in and out of megatron-core, without a conversion step and without pickles."""

from simpo_megatron.convert.hf import export_hf, load_hf_weights, refuse_existing_export

__all__ = ["export_hf", "load_hf_weights", "refuse_existing_export"]
