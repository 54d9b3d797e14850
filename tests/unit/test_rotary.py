"""Rotary embeddings of every family under every type of scaling turn as transformers' own modules do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from simpo_megatron import parallel
from simpo_megatron.config import config_from
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn  # noqa: E402

from simpo_megatron.mcore.families import FAMILIES, describe_hf_config  # noqa: E402
from simpo_megatron.mcore.family import TINY_MODEL  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402

MAX_LENGTH = 96
# Numbers that no published model has.
SCALINGS: tuple[dict[str, Any], ...] = (
    {},
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.7},
    {
        "rope_type": "llama3",
        "factor": 5.5,
        "low_freq_factor": 0.8,
        "high_freq_factor": 3.1,
        "original_max_position_embeddings": 48,
    },
    {"rope_type": "yarn", "factor": 3.3, "original_max_position_embeddings": 56},
    {
        "rope_type": "yarn",
        "factor": 6.1,
        "original_max_position_embeddings": 40,
        "beta_fast": 17.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.9,
        "mscale_all_dim": 0.6,
    },
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "attention_factor": 1.37},
    # Longer than its original length, and not.
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 128},
)
# Names of transformers 5, of 4, and both in one file, as where the block of a model card is added by hand.
FORMS = ("rope_parameters", "rope_scaling", "both")
# What these families do not have in transformers either, or is refused by design.
REFUSED = {"phi3": {"linear", "llama3", "yarn"}}
OF_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types")


@pytest.fixture(scope="module")
def groups():
    with parallel.alone() as groups:
        yield groups


def models(model_type: str) -> Iterator[dict[str, Any]]:
    """The family's first model with each rotary embedding, forms and bases in turn."""
    family = FAMILIES[model_type]
    plain = {"head_dim": 16, **TINY_MODEL, **next(iter(family.tests.values())), "num_hidden_layers": 2}
    # Of latent attention another key says what turns, and Phi-3 takes its heads from the widths.
    left_out = (*OF_ROPE, "head_dim") if "kv_lora_rank" in plain or model_type == "phi3" else OF_ROPE
    plain = {key: value for key, value in plain.items() if key not in left_out} | {"model_type": model_type}
    fractions: tuple[Any, ...] = (None, 0.25, 0.75) if family.turns_in_part else (None,)
    forms, bases = itertools.cycle(FORMS), itertools.cycle((None, 12345.0))
    for fraction, scaling in itertools.product(fractions, SCALINGS):
        whole = plain if fraction is None else {**plain, "partial_rotary_factor": fraction}
        rope = dict(scaling)
        if rope.get("rope_type") == "longrope":
            num_pairs = rotated_pairs(whole)
            rope["short_factor"] = [1 + 0.1 * pair for pair in range(num_pairs)]
            rope["long_factor"] = [3.0 + pair for pair in range(num_pairs)]
        form, base = next(forms), next(bases)
        yield {**whole, **written(rope, form, {} if base is None else {"rope_theta": base}, model_type)}


def rotated_pairs(config: dict[str, Any]) -> int:
    description = describe_hf_config(config, "config.json")
    latent, fraction = description.transformer.get("latent"), description.gpt["rotary_percent"]
    size = description.transformer["kv_channels"] if latent is None else latent.qk_pos_emb_head_dim
    return int(size * fraction) // 2


def written(rope: dict[str, Any], form: str, base: dict[str, Any], model_type: str) -> dict[str, Any]:
    # Gemma 3's file has one for each kind of layer under the names of transformers 5.
    if form == "rope_scaling" or model_type == "gemma3_text":
        return base | ({"rope_scaling": rope} if rope else {})
    if form == "rope_parameters" or not rope:
        return {"rope_parameters": rope | base} if rope or base else {}
    return {"rope_parameters": {"rope_type": "default", **base}, "rope_scaling": rope}


def rotary_of_transformers(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """(inverse frequencies, factor of sine and cosine) after a sequence of MAX_LENGTH."""
    hf_config = AutoConfig.for_model(**config)
    hf_config._experts_implementation = "eager"
    rotary = AutoModelForCausalLM.from_config(hf_config).model.rotary_emb
    inputs = torch.zeros(1, MAX_LENGTH, 8), torch.arange(MAX_LENGTH)[None]
    if hasattr(rotary, "full_attention_inv_freq"):
        rotary(*inputs, layer_type="full_attention")
        return rotary.full_attention_inv_freq, rotary.full_attention_attention_scaling
    rotary(*inputs)
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_rotary_embedding_is_transformers(groups, model_type: str) -> None:
    num_compared = 0
    for config in models(model_type):
        rope = {**config.get("rope_parameters", {}), **config.get("rope_scaling", {})}
        if rope.get("rope_type") in REFUSED.get(model_type, ()):
            with pytest.raises(ConfigError, match=r"rope_type|rope_parameters"):
                describe_hf_config(json.loads(json.dumps(config)), "config.json")
            continue
        inverse, factor = rotary_of_transformers(json.loads(json.dumps(config)))
        lengths = {"max_length": MAX_LENGTH, "max_prompt_length": MAX_LENGTH - 1}
        options = config_from(model="m", data=("d",), bf16=False, **lengths)
        (chunk,) = build_model(describe_hf_config(config, "config.json"), options, groups)
        # fp32 powers and products in another order.
        torch.testing.assert_close(chunk.rotary_pos_emb.inv_freq, inverse, rtol=1e-6, atol=0, msg=str(config))
        found = yarn._yarn_get_concentration_factor_from_config(chunk.config)
        assert found == pytest.approx(factor, rel=1e-6), config
        if model_type == "gemma3_text":
            own = [layer.self_attention for layer in chunk.decoder.layers if layer.self_attention.is_windowed]
            assert own and {yarn._yarn_get_concentration_factor_from_config(each.config) for each in own} == {1.0}
        num_compared += 1
    assert num_compared >= 4
