"""run_config.yaml beside a checkpoint: what Megatron-Bridge reads of it builds the model whose weights lie there."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import yaml
from tiny_models import DENSE, VOCAB, write_model
from transformers import AutoModelForCausalLM

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from simpo_megatron.offline.convert import to_mcore  # noqa: E402
from simpo_megatron.offline.weights import open_weights  # noqa: E402
from simpo_megatron.parallel import alone, seed_everything  # noqa: E402

# Fields of GPTModelProvider that are not TransformerConfig's, and what they are of GPTModel's arguments.
# Source: Megatron-Bridge 0.3.1 and 0.6.0, models/gpt_provider.py, `GPTModelProvider` and its `provide`.
OF_GPT_MODEL = {
    "share_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    "position_embedding_type": "position_embedding_type",
    "rotary_percent": "rotary_percent",
    "rotary_base": "rotary_base",
    "rope_scaling": "rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "seq_length": "max_sequence_length",
}
OF_PROVIDER = {*OF_GPT_MODEL, "vocab_size", "should_pad_vocab", "make_vocab_size_divisible_by", "hf_model_id"}
# What Bridge's load on a CPU sets, and kernels that are not there.
ON_CPU = {
    "use_cpu_initialization": True,
    "bf16": False,
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
}


def located(value):
    """The object that `_target_` names, as Bridge's instantiate gives it for `_call_: false`; other values stay."""
    if not isinstance(value, dict):
        return value
    assert value.keys() == {"_target_", "_call_"} and value["_call_"] is False
    module, _, name = value["_target_"].rpartition(".")
    assert module.split(".")[0] in ("torch", "megatron"), "the prefixes that Bridge allows"
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", ["llama31_scaled_rope", "llama32_tied", "qwen3"])
def test_what_bridge_reads_builds_the_model_of_the_weights(tmp_path, name):
    torch.manual_seed(4)
    write_model(DENSE[name][0], tmp_path / "hf", "float32")
    with alone() as groups:
        # megatron's attention draws from its own random states, dropout or not.
        seed_everything(1)
        to_mcore(open_weights(tmp_path / "hf", groups), tmp_path / "megatron", groups)
        release = tmp_path / "megatron" / "release"
        run_config = yaml.safe_load((release / "run_config.yaml").read_text())

        model = run_config["model"]
        assert model.pop("_target_") == "megatron.bridge.models.gpt_provider.GPTModelProvider"
        of_transformer = {field.name for field in dataclasses.fields(TransformerConfig)}
        assert model.keys() <= of_transformer | OF_PROVIDER
        assert (model["tensor_model_parallel_size"], model["pipeline_model_parallel_size"]) == (1, 1)
        assert model["vocab_size"] == VOCAB and model["should_pad_vocab"]
        checkpoint, tokenizer = run_config["checkpoint"], run_config["tokenizer"]
        assert [checkpoint[key] for key in ("save_rng", "save_optim", "fully_parallel_save")] == [False, False, True]
        assert tokenizer["tokenizer_type"] == "HuggingFaceTokenizer" and tokenizer["tokenizer_model"] == str(release)

        found = logits_of(model, of_transformer, release)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
        expected = reference(torch.arange(24).view(2, 12)).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found[..., :VOCAB], expected, rtol=0, atol=1e-4)


def logits_of(model, of_transformer, release):
    """Logits of the GPTModel that the provider would build, with the weights of the checkpoint."""
    given = {key: located(value) for key, value in model.items() if key in of_transformer}
    config = TransformerConfig(**{**given, **ON_CPU})
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    padded = -(-model["vocab_size"] // model["make_vocab_size_divisible_by"]) * model["make_vocab_size_divisible_by"]
    arguments = {theirs: model[ours] for ours, theirs in OF_GPT_MODEL.items()}
    gpt = GPTModel(config, spec, padded, **arguments).eval()
    whole = {"model": gpt.sharded_state_dict()}
    state = dist_checkpointing.load(
        extract_matching_values(whole, lambda value: isinstance(value, ShardedObject))[1], str(release)
    )
    gpt.load_state_dict(state["model"], strict=False)
    tokens = torch.arange(24).view(2, 12)
    mask = torch.ones(1, 1, 12, 12).triu(1).bool()
    with torch.no_grad():
        return gpt(tokens, torch.arange(12).expand(2, -1), mask)


def test_a_model_that_needs_more_than_the_provider_has_gets_none(tmp_path):
    write_model(DENSE["gemma2"][0], tmp_path / "hf", "float32")
    with alone() as groups:
        to_mcore(open_weights(tmp_path / "hf", groups), tmp_path / "megatron", groups)
    assert (tmp_path / "megatron" / "release" / "COMMIT.json").is_file()
    assert not (tmp_path / "megatron" / "release" / "run_config.yaml").exists()
