"""The model of a plan: a folder, a config.json, a published model by name, or the model of a preset."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from simpo_megatron.config import PRESETS
from simpo_megatron.errors import CheckpointError, ConfigError
from simpo_megatron.mcore.families import ModelDescription, describe_hf_config, describe_hf_model
from simpo_megatron.mcore.hf import model_folder, read_hf_json


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
_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_64_EXPERTS = {
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
}
_GPT_OSS_SIZES = (2880, 2880, 64, 8, 201088, 131072)
_GPT_OSS = {"head_dim": 64, "num_experts_per_tok": 4}
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
    "baidu/ERNIE-4.5-21B-A3B-PT": _published(
        "ernie4_5_moe",
        28,
        2560,
        12288,
        20,
        4,
        103424,
        131072,
        head_dim=128,
        moe_num_experts=64,
        moe_k=6,
        moe_intermediate_size=1536,
        moe_num_shared_experts=2,
        use_bias=False,
        tie_word_embeddings=True,
    ),
    "google/gemma-3-1b-it": _published("gemma3_text", 26, 1152, 6912, 4, 1, 262144, 32768, sliding_window=512),
    "zai-org/GLM-4.5-Air": _published(
        "glm4_moe",
        46,
        4096,
        10944,
        96,
        8,
        151552,
        131072,
        head_dim=128,
        n_routed_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1408,
        attention_bias=True,
    ),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": _published(
        "deepseek_v2", 27, 2048, 10944, 16, 16, 102400, 163840, **_LATENT, **_64_EXPERTS
    ),
    "moonshotai/Moonlight-16B-A3B-Instruct": _published(
        "deepseek_v3", 27, 2048, 11264, 16, 16, 163840, 8192, **_LATENT, **_64_EXPERTS, routed_scaling_factor=2.446
    ),
    "deepseek-ai/DeepSeek-V3": _published("deepseek_v3", 61, 7168, 18432, 128, 128, 129280, 163840),
    "openai/gpt-oss-20b": _published(
        "gpt_oss", 24, 2880, 2880, 64, 8, 201088, 131072, num_local_experts=32, **_GPT_OSS
    ),
    "openai/gpt-oss-120b": _published("gpt_oss", 36, *_GPT_OSS_SIZES, num_local_experts=128, **_GPT_OSS),
    "ibm-granite/granite-3.3-8b-instruct": _published(
        "granite", 40, 4096, 12800, 32, 8, 49159, 131072, tie_word_embeddings=True
    ),
}
"""The sizes in the config.json of models that the shipped configurations are for, and of other families.

They are written down here, not read from the hub. A test builds each by transformers and compares the number of its
parameters with the published one.
"""


def find_model(name: str) -> ModelDescription:
    """The architecture of `name`: a Hugging Face folder, a config.json, a published model, a preset or a name on the
    hub.

    Raises:
        ConfigError: none of these, or a family that cannot be trained.
        CheckpointError: a folder or file that cannot be read.
    """
    path, published = Path(name), _published_name(name)
    if path.is_dir():
        return describe_hf_model(path)
    if path.is_file():
        return describe_hf_config(read_hf_json(path.parent, path.name), name)
    if published is not None:
        return describe_hf_config(PUBLISHED[published], published)
    try:
        return describe_hf_model(model_folder(name, ("config.json",)))
    except CheckpointError as error:
        known = [short for published in PUBLISHED for short in (published, published.rpartition("/")[2])]
        close = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0))
        raise ConfigError(
            f"model: found {name!r}, expected a Hugging Face folder, a config.json, a preset, a name on the hub, or a "
            f"published model such as {close} ({error})"
        ) from None


def source_of(name: str) -> str:
    """The place that `find_model` takes the sizes of `name` from, in words."""
    path, published = Path(name), _published_name(name)
    if path.exists():
        return f"{path / 'config.json' if path.is_dir() else path}"
    if published is not None:
        return f"this program's own table, of {published}; --model DIR reads a config.json"
    return f"config.json of {name} on the hub"


def _published_name(name: str) -> str | None:
    """The name in PUBLISHED that `name`, a preset or a part of it, means."""
    if name in PRESETS:
        name = PRESETS[name].summary.split(" on ")[0]
    wanted = name.lower().rpartition("/")[2]
    for published in PUBLISHED:
        short = published.lower().rpartition("/")[2]
        if short == wanted or short.startswith((wanted + "-instruct", wanted + "-it")):
            return published
    return None
