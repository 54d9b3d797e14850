"""The proof of a family: small models made by transformers and computed by megatron-core, compared."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpo_megatron.config import config_from
from simpo_megatron.convert import export_hf, load_hf_weights
from simpo_megatron.mcore.families import describe_hf_model
from simpo_megatron.mcore.family import TINY_MODEL, Family
from simpo_megatron.mcore.model import build_model
from simpo_megatron.offline.compare import compare_tensors
from simpo_megatron.offline.weights import HfWeights
from simpo_megatron.parallel import ParallelGroups

# Tokens of a sequence: long for some models whose rotary embedding depends on the length, short for others.
_LENGTH = 38


@dataclass(frozen=True)
class Proof:
    """The findings of one model."""

    model: str
    largest_difference: float
    """Between fp32 logits of megatron-core and transformers, whose standard deviation is about one."""
    num_tensors: int
    num_equal: int
    """Tensors that came back bit for bit when the loaded model was exported."""


def prove(family: Family, groups: ParallelGroups) -> Iterator[Proof]:
    """The findings of each of the family's models, on this process alone, in fp32."""
    for name, keys in family.tests.items():
        yield prove_model(name, {**TINY_MODEL, **keys, "model_type": family.model_type}, groups)


def prove_model(name: str, hf_config: Mapping[str, Any], groups: ParallelGroups) -> Proof:
    """The findings of a model of random weights, made from the keys of a config.json.

    Raises:
        ConfigError: megatron-core does not compute such a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(1)
    config = AutoConfig.for_model(**hf_config)
    # transformers' other implementations of experts need widths in whole vectors.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for values in _trained_values(model):
            # Norms and biases are one and zero until they are trained.
            values.add_(0.1 * torch.randn_like(values))
        before, after = Path(folder, "before"), Path(folder, "after")
        model.save_pretrained(before)
        tokens = torch.randint(model.config.vocab_size, (2, _LENGTH))
        expected = model.eval()(tokens).logits
        found = _logits_of_megatron(before, after, tokens, groups)
        compared = list(compare_tensors(HfWeights(before), HfWeights(after)))
    difference = float((found[..., : expected.shape[-1]] - expected).abs().max())
    return Proof(name, difference, len(compared), sum(tensor.is_equal for tensor in compared))


def _trained_values(model: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters, and the biases of routers, which are buffers."""
    yield from model.parameters()
    yield from (buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))


def _logits_of_megatron(model: Path, out: Path, tokens: Tensor, groups: ParallelGroups) -> Tensor:
    """Logits [B, S, V] of the model in the folder, which is exported to `out` as it was loaded."""
    lengths = {"max_length": _LENGTH, "max_prompt_length": _LENGTH - 1}
    config, description = (
        config_from(model=str(model), data=("unused",), bf16=False, **lengths),
        describe_hf_model(model),
    )
    (chunk,) = chunks = build_model(description, config, groups)
    load_hf_weights(chunks, model, description, tp_rank=0, tp_size=1)
    export_hf(chunks, description, model, out, groups=groups, dtype=torch.float32)
    return chunk.eval()(tokens, torch.arange(tokens.shape[1]).expand(len(tokens), -1), None)
