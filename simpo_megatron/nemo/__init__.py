"""Reads configurations of NeMo 1 / Aligner, NeMo 2, NeMo-RL and Megatron-Bridge; nothing of NeMo is imported."""

from simpo_megatron.nemo.loading import load_nemo_command, load_nemo_config, names_nemo_config
from simpo_megatron.nemo.translation_report import TranslationReport

__all__ = ["TranslationReport", "load_nemo_command", "load_nemo_config", "names_nemo_config"]
