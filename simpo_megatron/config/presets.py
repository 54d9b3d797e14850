"""The published SimPO settings by name, and the one the demo runs with.

Source: README table and training_configs/ of the reference implementation (princeton-nlp/SimPO), which leaves
weight decay, clipping and Adam's constants to the defaults of Hugging Face's trainer, as ours do. Two of its runs
replace the model's chat template: Gemma's in its YAML file, Mistral's in scripts/run_simpo.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from simpo_megatron.config.sections import DEMO

_PUBLISHED = {
    "epochs": 1,
    "global_batch_size": 128,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.1,
    "bf16": True,
    "seed": 42,
    "max_length": 2048,
    "max_prompt_length": 1800,
    "template_mode": "princeton",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings under a name; `options` are options of the configuration."""

    summary: str
    options: dict[str, Any] = field(default_factory=dict)


def _published(model: str, data: str, **options: Any) -> Preset:
    return Preset(summary=f"{model} on {data}", options=_PUBLISHED | options)


PRESETS = {
    DEMO: Preset(
        summary="a tiny model and bundled pairs: minutes on a CPU; not settings to learn from",
        options={
            "model": DEMO,
            "data": (DEMO,),
            "bf16": False,
            "lr": 1e-3,
            "global_batch_size": 16,
            "epochs": 4,
            "log_interval": 4,
            "eval_interval": 24,
            "max_length": 512,
            "max_prompt_length": 384,
            "tokens_per_microbatch": 1024,
            "save": "runs/demo",
            "export_hf": "runs/demo/hf",
        },
    ),
    "mistral-base": _published(
        "alignment-handbook/zephyr-7b-sft-full",
        "HuggingFaceH4/ultrafeedback_binarized",
        lr=3e-7,
        beta=2.0,
        gamma_beta_ratio=0.8,
        max_length=1024,
        max_prompt_length=512,
    ),
    "mistral-instruct": _published(
        "mistralai/Mistral-7B-Instruct-v0.2",
        "princeton-nlp/mistral-instruct-ultrafeedback",
        lr=5e-7,
        beta=2.5,
        gamma_beta_ratio=0.1,
        chat_template="simpo-mistral",
    ),
    "llama3-base": _published(
        "princeton-nlp/Llama-3-Base-8B-SFT",
        "HuggingFaceH4/ultrafeedback_binarized",
        lr=6e-7,
        beta=2.0,
        gamma_beta_ratio=0.5,
    ),
    "llama3-instruct": _published(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "princeton-nlp/llama3-ultrafeedback",
        lr=1e-6,
        beta=2.5,
        gamma_beta_ratio=0.55,
    ),
    "llama3-instruct-v0.2": _published(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "princeton-nlp/llama3-ultrafeedback-armorm",
        lr=1e-6,
        beta=10.0,
        gamma_beta_ratio=0.3,
    ),
    "gemma2-9b-it": _published(
        "google/gemma-2-9b-it",
        "princeton-nlp/gemma2-ultrafeedback-armorm",
        lr=8e-7,
        beta=10.0,
        gamma_beta_ratio=0.5,
        chat_template="simpo-gemma2",
    ),
}
