"""The options of the installed megatron-core for each dtype; none of them can be executed without a GPU."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from simpo_megatron.commands import convert
from simpo_megatron.config import Machine, PrecisionConfig, config_from, resolve
from simpo_megatron.config.options import option_table
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import model as mcore_model
from simpo_megatron.mcore.model import wrap_in_ddp
from simpo_megatron.mcore.precision import export_dtype, precision_options, rounding

SHAPE = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_makes_a_config_that_megatron_accepts(recipe):
    options = precision_options(PrecisionConfig(fp8_recipe=recipe))
    config = TransformerConfig(**SHAPE, **options)
    assert not config.fp8_param
    assert config.fp8 == ("hybrid" if recipe in ("delayed", "tensorwise") else "e4m3")
    assert config.fp8_recipe == recipe
    assert config.params_dtype is config.pipeline_dtype is torch.bfloat16


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_every_option_is_a_field_of_the_installed_config(recipe):
    known = {field.name for field in fields(TransformerConfig)}
    assert set(precision_options(PrecisionConfig(fp8_recipe=recipe))) <= known
    assert "fp8_recipe" in {field.name for field in fields(OptimizerConfig)}
    assert "fp8_param_gather" in {field.name for field in fields(DistributedDataParallelConfig)}


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_weights_kept_in_fp8_are_a_word_to_the_model_and_to_its_data_parallelism(recipe, monkeypatch):
    options = {"use_distributed_optimizer": True, "fp8_recipe": recipe, "fp8_param_gather": True}
    config = config_from(model="folder", data=("a.jsonl",), **options)
    assert TransformerConfig(**SHAPE, **precision_options(config.precision)).fp8_param
    monkeypatch.setattr(mcore_model, "DistributedDataParallel", lambda config, ddp_config, chunk, **kwargs: ddp_config)
    (ddp_config,) = wrap_in_ddp([SimpleNamespace(config=None)], config)
    assert ddp_config.fp8_param_gather and ddp_config.use_distributed_optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp8_recipe": None}, "fp8_recipe tensorwise or blockwise with it, found none"),
        ({"fp8_recipe": "delayed"}, "fp8_recipe tensorwise or blockwise with it, found delayed"),
        ({"use_distributed_optimizer": False}, "use_distributed_optimizer with it"),
        ({"lora_rank": 8}, "no lora_rank beside it"),
        ({"model": {"num_moe_experts": 8, "moe_ffn_hidden_size": 128}}, "a dense model"),
        ({"machine": Machine(has_cuda=True, compute_capability=(9, 0))}, "pip install 'simpo-megatron[te]'"),
    ],
)
def test_weights_kept_in_fp8_are_refused_where_nothing_could_keep_their_masters(options, message):
    gpu = Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(9, 0))
    shape = {"num_layers": 4, "num_attention_heads": 4, "hidden_size": 128, "ffn_hidden_size": 256}
    model, machine = {**shape, **options.pop("model", {})}, options.pop("machine", gpu)
    asked = {"fp8_recipe": "tensorwise", "fp8_param_gather": True, "use_distributed_optimizer": True, **options}
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        resolve(config_from(model="folder", data=("a.jsonl",), **asked), world_size=1, model=model, machine=machine)


def test_delayed_scaling_remembers_more_than_one_step():
    assert precision_options(PrecisionConfig(fp8_recipe="delayed"))["fp8_amax_history_len"] == 1024


def test_current_scaling_keeps_first_and_last_layer_in_bf16():
    config = TransformerConfig(**SHAPE, **precision_options(PrecisionConfig(fp8_recipe="tensorwise")))
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 1)


def test_fp32_is_fp32_throughout():
    options = precision_options(PrecisionConfig(bf16=False))
    assert options == {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, torch.bfloat16),
        ({"bf16": False}, torch.bfloat16),
        ({"bf16": False, "export_dtype": "stored"}, torch.float32),
        ({"export_dtype": "stored"}, torch.bfloat16),
        ({"export_dtype": "float16"}, torch.float16),
    ],
)
def test_an_export_is_bf16_unless_another_format_is_named(options, expected):
    assert export_dtype(config_from(model="unused", data=("unused",), **options)) is expected


def test_what_an_export_rounds_is_said_and_what_it_keeps_is_not():
    assert rounding([torch.bfloat16], torch.float32) is rounding([torch.bfloat16], torch.bfloat16) is None
    assert rounding([torch.float32], torch.bfloat16) == "float32 weights are rounded to bfloat16"
    # As many bits, but other ones.
    assert rounding([torch.bfloat16], torch.float16) == "bfloat16 weights are rounded to float16"
    both = rounding([torch.float32, torch.bfloat16, torch.float16], torch.bfloat16)
    assert both == "float16 and float32 weights are rounded to bfloat16"


def test_the_offline_tool_takes_the_words_of_the_trainer():
    assert option_table()["export_dtype"].choices == convert.DTYPES
