"""The model of a plan: a folder, a config.json, a published model by name, or the model of a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpo_megatron.config import PRESETS
from simpo_megatron.errors import CheckpointError, ConfigError
from simpo_megatron.mcore.families import ModelDescription, describe_hf_config, describe_hf_model
from simpo_megatron.mcore.hf_files import read_hf_json
from simpo_megatron.mcore.hub import model_folder


def _published(model_type: str, *sizes: int, **more: Any) -> dict[str, Any]:
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    fixed = {"model_type": model_type, "hidden_act": "silu", "rms_norm_eps": 1e-5}
    return fixed | dict(zip(names, sizes, strict=True)) | more


_LLAMA_3_8B = _published("llama", 32, 4096, 14336, 32, 8, 128256, 8192)
_MISTRAL_7B = ("mistral", 32, 4096, 14336, 32, 8, 32000, 32768)
_EIGHT_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
_128_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128, "norm_topk_prob": True}
PUBLISHED = {
    "meta-llama/Llama-3.1-70B-Instruct": _published("llama", 80, 8192, 28672, 64, 8, 128256, 131072),
    "Qwen/Qwen2.5-72B-Instruct": _published("qwen2", 80, 8192, 29568, 64, 8, 152064, 32768),
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "princeton-nlp/Llama-3-Base-8B-SFT": _LLAMA_3_8B,
    "mistralai/Mistral-7B-Instruct-v0.2": _published(*_MISTRAL_7B, sliding_window=None),
    "google/gemma-2-9b-it": _published("gemma2", 42, 3584, 14336, 16, 8, 256000, 8192),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _published("mixtral", *_MISTRAL_7B[1:], **_EIGHT_EXPERTS),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": _published(
        "mixtral", 56, 6144, 16384, 48, 8, 32768, 65536, **_EIGHT_EXPERTS
    ),
    "Qwen/Qwen3-30B-A3B": _published(
        "qwen3_moe", 48, 2048, 6144, 32, 4, 151936, 40960, moe_intermediate_size=768, **_128_EXPERTS
    ),
    "Qwen/Qwen3-235B-A22B": _published(
        "qwen3_moe", 94, 4096, 12288, 64, 4, 151936, 40960, moe_intermediate_size=1536, **_128_EXPERTS
    ),
    "alignment-handbook/zephyr-7b-sft-full": _published(*_MISTRAL_7B, sliding_window=4096),
    "google/gemma-7b-it": _published("gemma", 28, 3072, 24576, 16, 16, 256000, 8192, hidden_act="gelu_pytorch_tanh"),
    "zai-org/GLM-4-9B-0414": _published("glm4", 40, 4096, 13696, 32, 2, 151552, 32768),
    "HuggingFaceTB/SmolLM3-3B": _published("smollm3", 36, 2048, 11008, 16, 4, 128256, 65536),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": _published("seed_oss", 64, 5120, 27648, 80, 8, 155136, 524288),
    "baidu/ERNIE-4.5-0.3B-PT": _published("ernie4_5", 18, 1024, 3072, 16, 2, 103424, 131072),
    "ibm-granite/granite-3.3-8b-instruct": _published("granite", 40, 4096, 12800, 32, 8, 49159, 131072),
}
"""The sizes in the config.json of models that the shipped configurations are for, and of other families."""


def find_model(name: str) -> ModelDescription:
    """The architecture of `name`: a Hugging Face folder, a config.json, a published model, a preset or a name on the
    hub.

    Raises:
        ConfigError: none of these, or a family that cannot be trained.
        CheckpointError: a folder or file that cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        return describe_hf_model(path)
    if path.is_file():
        return describe_hf_config(read_hf_json(path.parent, path.name), name)
    if name in PRESETS:
        name = PRESETS[name].summary.split(" on ")[0]
    wanted = name.lower().rpartition("/")[2]
    for published, config in PUBLISHED.items():
        short = published.lower().rpartition("/")[2]
        if short == wanted or short.startswith((wanted + "-instruct", wanted + "-it")):
            return describe_hf_config(config, published)
    try:
        return describe_hf_model(model_folder(name, ("config.json",)))
    except CheckpointError as error:
        raise ConfigError(
            f"model: found {name!r}, expected a Hugging Face folder, a config.json, a name on the hub or one of "
            f"{', '.join(PUBLISHED)} ({error})"
        ) from None
